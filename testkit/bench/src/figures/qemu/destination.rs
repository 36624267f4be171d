//! A destination that takes pages as QEMU does, and a guest that tells how long each of its faults took.
//!
//! The guest touches missing memory; one thread reads the faults and asks for the pages, another (two with preempt)
//! reads the pages and installs them one by one with `UFFDIO_COPY`: the threads and the system calls that QEMU has.
//! All of them are on one core, the server is on another: left to the scheduler, an idle machine has them all on one
//! core or not, by chance, and a fault takes 15 us or 50.

use std::collections::HashMap;
use std::hint::black_box;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use mapped_ram::Snapshot;
use page_files::MappedRam;
use page_source::PageSource;
use qemu_pages::serve::{Address, Opening, Options, ServeError, Server};
use qemu_pages::wire::record::{Reader, Record};
use qemu_pages::wire::return_path::Message;

use super::super::{Bench, Measured};
use crate::floor::fault::scattered;
use crate::sys::{Map, PAGE, Uffd, pin, unpin};

/// Faults measured in a round, if the guest does not rest.
const FAULTS: usize = 2000;
/// The same, if it does.
const RARE_FAULTS: usize = 250;
/// With less the median means little.
const ENOUGH: usize = 100;
/// A touch that took less found the page there.
const FAULT_NANOSECONDS: f64 = 1500.0;
/// What is asked for at a time, in bytes.
const ASKED: u32 = 4096;

/// What is done in a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct Habit {
    /// Everything else is pushed meanwhile.
    pub(super) push: bool,
    /// On a second connection.
    pub(super) preempt: bool,
    /// Between two touches.
    pub(super) rest: Duration,
}

/// A snapshot to be served.
pub(super) struct Served {
    source: Arc<MappedRam>,
    opening: Opening,
    /// Its largest block, and the length of that in bytes.
    block: String,
    len: usize,
}

impl Served {
    pub(super) fn open(path: &Path) -> Measured<Served> {
        let snapshot = Arc::new(Snapshot::open(path)?);
        let largest = snapshot.layout().blocks().iter().max_by_key(|block| block.length()).ok_or("no RAM")?;
        let (block, len) = (largest.name().to_owned(), usize::try_from(largest.length().0)?);
        let configuration = snapshot.configuration().clone();
        let opening = Opening { configuration, early: Vec::new(), devices: b"devices".to_vec() };
        Ok(Served { source: Arc::new(MappedRam::new(snapshot)?), opening, block, len })
    }

    /// Nanoseconds that each of the guest's faults took.
    pub(super) fn faults(&self, bench: &Bench, habit: Habit) -> Measured<Vec<f64>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("incoming");
        let listener = UnixListener::bind(&path)?;
        // The page behind the end tells the thread that reads faults to go.
        let memory = Map::anonymous(self.len + PAGE)?;
        let uffd = Uffd::register(&memory)?;
        let mut options = Options::default();
        options.background = habit.push;
        options.preempt = habit.preempt;
        let source: Arc<dyn PageSource> = Arc::<MappedRam>::clone(&self.source);
        let server = Server::new(source, &HashMap::new(), options)?;
        let (control, opening) = (server.control(), self.opening.clone());
        let far = bench.far;
        let serving = thread::spawn(move || {
            // Where it can't be done the figure is only less steady. Its threads inherit it.
            let _ = pin(far);
            server.start(&Address::Unix(path), &opening)
        });
        let (main, _) = listener.accept()?;
        pin(bench.near)?;
        let destination = Destination {
            memory: &memory,
            uffd: &uffd,
            listener: &listener,
            block: &self.block,
            preempt: habit.preempt,
            back: Mutex::new(main.try_clone()?),
            over: AtomicBool::new(false),
        };
        let faults = thread::scope(|scope| {
            let (loaded, is_loaded) = mpsc::channel();
            let this = &destination;
            let pages = scope.spawn(move || this.until_over(|| this.converse(scope, main, &loaded)));
            let asking = scope.spawn(|| this.ask());
            let faults = if is_loaded.recv().is_ok() { this.touch(habit) } else { Vec::new() };
            control.stop();
            black_box(memory.touch(self.len));
            let ended = [pages.join(), asking.join()];
            ended.into_iter().try_for_each(|ended| ended.unwrap_or_else(|_| Err(io::Error::other("a panic"))))?;
            Ok::<_, io::Error>(faults)
        });
        unpin()?;
        let faults = faults?;
        match serving.join() {
            Ok(Ok(_) | Err(ServeError::Stopped { .. })) => {}
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => return Err("the server panicked".into()),
        }
        if faults.len() < ENOUGH {
            return Err(format!("only {} faults before all was pushed", faults.len()).into());
        }
        Ok(faults)
    }
}

struct Destination<'a> {
    memory: &'a Map,
    uffd: &'a Uffd,
    listener: &'a UnixListener,
    block: &'a str,
    preempt: bool,
    back: Mutex<UnixStream>,
    over: AtomicBool,
}

impl Destination<'_> {
    /// The guest: touches pages far from each other.
    fn touch(&self, habit: Habit) -> Vec<f64> {
        let wanted = if habit.rest.is_zero() { FAULTS } else { RARE_FAULTS };
        let mut faults = Vec::with_capacity(wanted);
        for page in scattered(self.memory.len() / PAGE - 1) {
            let start = Instant::now();
            black_box(self.memory.touch(page * PAGE));
            let took = start.elapsed().as_secs_f64() * 1e9;
            if self.over.load(Ordering::SeqCst) || faults.len() == wanted {
                break;
            }
            if took >= FAULT_NANOSECONDS {
                faults.push(took);
                if !habit.rest.is_zero() {
                    thread::sleep(habit.rest);
                }
            }
        }
        faults
    }

    /// Reads faults, and asks for the pages.
    fn ask(&self) -> io::Result<()> {
        let mut known = false;
        loop {
            let page = self.uffd.next_fault()? & !(PAGE as u64 - 1);
            let start = page - self.memory.address(0);
            if start == (self.memory.len() - PAGE) as u64 {
                return self.uffd.copy(page, [0_u8; PAGE].as_ptr() as u64, PAGE);
            }
            let block = (!known).then(|| self.block.to_owned());
            known = true;
            // A server that is gone is noticed where pages are read.
            let _ = self.say(&Message::Request { block, start, length: ASKED });
        }
    }

    fn say(&self, message: &Message) -> io::Result<()> {
        let mut bytes = Vec::new();
        message.push(&mut bytes);
        let mut back = self.back.lock().unwrap_or_else(PoisonError::into_inner);
        back.write_all(&bytes)
    }

    /// Reads until the connection ends; then threads that wait for a page stop waiting.
    fn until_over(&self, read: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let ended = read();
        if self.over.swap(true, Ordering::SeqCst) {
            // The other connection ended before, and nothing can be installed since.
            return Ok(());
        }
        self.uffd.forget(self.memory.address(0), (self.memory.len() - PAGE) as u64)?;
        match ended {
            Err(error) if !matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                Err(error)
            }
            _ => Ok(()),
        }
    }

    /// Reads the main connection.
    fn converse<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        main: UnixStream,
        loaded: &mpsc::Sender<()>,
    ) -> io::Result<()> {
        let from = &mut BufReader::with_capacity(32 << 10, main);
        let mut records = Reader::new();
        skip(from, 9)?;
        let configuration = number::<4>(from)?;
        skip(from, configuration)?;
        loop {
            match number::<1>(from)? {
                0 => return self.say(&Message::Shut(0)),
                1 => {
                    skip(from, 4)?;
                    skip_name(from)?;
                    skip(from, 8)?;
                    let mut left = number::<8>(from)? & !(PAGE as u64 - 1);
                    while left > 0 {
                        skip_name(from)?;
                        left -= number::<8>(from)?;
                    }
                    skip(from, 8 + 5)?;
                }
                2 | 3 => {
                    skip(from, 4)?;
                    self.take(from, &mut records)?;
                    skip(from, 5)?;
                }
                8 => self.command(scope, from, loaded)?,
                other => return Err(io::Error::other(format!("a part of kind {other}"))),
            }
        }
    }

    fn command<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        from: &mut impl Read,
        loaded: &mpsc::Sender<()>,
    ) -> io::Result<()> {
        let (command, length) = (number::<2>(from)?, number::<2>(from)?);
        let mut payload = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        from.read_exact(&mut payload)?;
        let value = |payload: &[u8]| number::<4>(&mut &*payload);
        match command {
            // PING
            2 => {
                let ping = u32::try_from(value(&payload)?).map_err(io::Error::other)?;
                self.say(&Message::Pong(ping))?;
                if ping == 1 && self.preempt {
                    let (fast, _) = self.listener.accept()?;
                    scope.spawn(move || self.until_over(|| self.take(&mut BufReader::new(fast), &mut Reader::new())));
                }
            }
            // PACKAGED: there are no devices to load.
            7 => {
                skip(from, value(&payload)?)?;
                self.say(&Message::Pong(3))?;
                // Nobody waits for it any more only if all is over.
                let _ = loaded.send(());
            }
            _ => {}
        }
        Ok(())
    }

    /// Installs pages until the section ends.
    fn take(&self, from: &mut impl Read, records: &mut Reader) -> io::Result<()> {
        let mut page = [0; PAGE];
        loop {
            let index = match records.next(from, &mut page)? {
                Record::End => return Ok(()),
                Record::Page(index) => index.0,
                Record::Zero(index) => {
                    page.fill(0);
                    index.0
                }
            };
            if records.block() == self.block {
                self.uffd.copy(self.memory.address(0) + index * PAGE as u64, page.as_ptr() as u64, PAGE)?;
            }
        }
    }
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes.iter().fold(0, |all, byte| (all << 8) | u64::from(*byte)))
}

fn skip(from: &mut impl Read, length: u64) -> io::Result<()> {
    let skipped = io::copy(&mut from.take(length), &mut io::sink())?;
    if skipped < length { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn skip_name(from: &mut impl Read) -> io::Result<()> {
    let length = number::<1>(from)?;
    skip(from, length)
}
