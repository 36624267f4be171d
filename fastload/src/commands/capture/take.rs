//! Taking what QEMU sends.

use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mapped_ram::Writer;
use page_files::MappedRamSink;
use page_source::{End, OneShot, PageSink};
use page_units::ByteLen;
use qemu_pages::receive::{DeviceState, QemuStream};

use super::check::Guest;
use super::interrupt::Interrupts;
use super::output::{self, Captured};
use super::run_state;
use super::session::{Freeze, Session, Stage};
use crate::commands::Failure;
use crate::screen;

/// What the other side is called.
const PEER: &str = "the snapshot that QEMU sends";
/// How long QEMU may take to say that it is done, after all has come.
const LAST_WORD: Duration = Duration::from_secs(60);
/// How long it may take to say what went wrong, after it has hung up.
const EXPLANATION: Duration = Duration::from_secs(1);

/// Everything that makes the file, which is not published yet.
#[derive(Debug)]
pub(super) struct Taken {
    output: PathBuf,
    device_state: DeviceState,
    sink: Arc<MappedRamSink>,
    freeze: Option<Freeze>,
    sent: Instant,
    /// The guest was stopped for the capture only.
    was_running: bool,
}

impl Taken {
    /// The same of a guest that was running until the capture stopped it: the file says so.
    pub(super) fn that_was_running(self) -> Taken {
        Taken { was_running: true, ..self }
    }

    /// Gives the file its name.
    pub(super) fn publish(self, begun: Instant) -> Result<Captured, Failure> {
        let device_state = self.device_state.get().ok_or("the device state has not come")?;
        if self.was_running {
            self.sink.publish(&run_state::as_running(device_state)?)?;
        } else {
            self.sink.publish(device_state)?;
        }
        let writer = self.sink.writer();
        let ((stored, zero), ram) = (self.sink.received(), writer.layout().total());
        let meta = std::fs::metadata(&self.output).map_err(|error| format!("{}: {error}", self.output.display()))?;
        let allocated = meta.blocks().saturating_mul(512);
        Ok(Captured {
            allocated,
            machine: writer.machine().to_owned(),
            device_state: device_state.len() as u64,
            output: self.output,
            ram,
            stored: stored.0,
            zero: zero.0,
            freeze: self.freeze,
            sent: self.sent.saturating_duration_since(begun),
            complete: begun.elapsed(),
            disks: Vec::new(),
            warnings: Vec::new(),
        })
    }
}

/// Takes all of it, and waits until QEMU too says that it is done.
pub(super) fn take(
    session: &mut Session<'_>,
    guest: &Guest,
    output: &Path,
    interrupts: &Interrupts,
    json: bool,
) -> Result<Taken, Failure> {
    let mut watch = Watch { session, interrupts, json, freeze: None, failed: None };
    let socket = watch.session.socket()?;
    let source = watch.open(socket, guest.most_ram)?;
    let writer = Writer::create(output, source.configuration(), source.layout().clone())?;
    let (device_state, sink) = (source.device_state(), Arc::new(MappedRamSink::new(writer)));
    let feed = Box::new(source).start(Arc::clone(&sink) as Arc<dyn PageSink>)?;
    watch.pages(&sink)?;
    feed.finish()?;
    let sent = Instant::now();
    watch.last_word()?;
    Ok(Taken { output: output.to_owned(), sink, freeze: watch.freeze, sent, device_state, was_running: false })
}

/// What is looked after meanwhile.
struct Watch<'a, 'q> {
    session: &'a mut Session<'q>,
    interrupts: &'a Interrupts,
    json: bool,
    freeze: Option<Freeze>,
    /// When QEMU said that it gave up.
    failed: Option<Instant>,
}

impl Watch<'_, '_> {
    /// A guest that is held goes on as soon as it may.
    fn release(&mut self, protected: bool) -> Result<(), Failure> {
        if protected && self.session.is_held() { self.session.go() } else { Ok(()) }
    }

    /// A moment of waiting: for the freeze point, for Ctrl-C.
    fn look(&mut self) -> Result<(), Failure> {
        if self.interrupts.came() {
            return Err("cancelled: the guest goes on, and nothing was written".into());
        }
        if let Some(freeze) = self.session.look()? {
            self.freeze = Some(freeze);
            output::frozen(freeze, self.json)?;
        }
        // A QEMU that gave up hangs up, and then the stream tells how far it came, or what we had against it.
        if matches!(self.session.stage(), Stage::Failed(_)) {
            let since = *self.failed.get_or_insert_with(Instant::now);
            if since.elapsed() > EXPLANATION {
                self.session.hang_up();
            }
        }
        Ok(())
    }

    /// Waits for the beginning of the stream.
    fn open(&mut self, socket: UnixStream, most_ram: ByteLen) -> Result<QemuStream, Failure> {
        let hang_up = socket.try_clone()?;
        let opened = thread::scope(|scope| {
            let opening = scope.spawn(move || QemuStream::open(socket, PEER, most_ram));
            while !opening.is_finished() {
                if let Err(failure) = self.look() {
                    // The thread ends then.
                    let _ = hang_up.shutdown(Shutdown::Both);
                    return Err(failure);
                }
            }
            opening.join().map_err(|_| Failure::from("the stream can't be read: its thread has ended"))
        });
        opened?.map_err(|error| self.explained(&format!("{PEER}: {error}")))
    }

    /// Waits for the end of the stream.
    fn pages(&mut self, sink: &MappedRamSink) -> Result<(), Failure> {
        let bar = screen::Progress::new(sink.writer().layout().total().0, self.json);
        let ended = loop {
            match sink.ended() {
                Some(End::Complete) => break Ok(()),
                Some(End::Broken(error)) => break Err(self.explained(&error.to_string())),
                Some(End::Stopped) => break Err("the stream can't be read: it was stopped".into()),
                None => {}
            }
            let (stored, zero) = sink.received();
            bar.set(stored.to_bytes().0.saturating_add(zero.to_bytes().0));
            // With the first page QEMU protects them all, and has saved the devices.
            let protected = stored.0 > 0 || zero.0 > 0;
            if let Err(failure) = self.release(protected).and_then(|()| self.look()) {
                break Err(failure);
            }
        };
        drop(bar);
        // If it is we who can't go on, QEMU only knows that we hung up.
        ended.map_err(|failure| sink.refused().map_or(failure, Failure::from))
    }

    /// Waits until QEMU says that it is done.
    fn last_word(&mut self) -> Result<(), Failure> {
        let until = Instant::now() + LAST_WORD;
        loop {
            match self.session.ask()? {
                Stage::Completed => break,
                Stage::Failed(why) => return Err(format!("QEMU sent everything, then gave up: {why}").into()),
                Stage::Active if Instant::now() > until => {
                    return Err("QEMU sent everything, but does not say that it is done".into());
                }
                Stage::Active | Stage::Ready => self.look()?,
            }
        }
        self.release(true)?;
        // The freeze point was before that.
        if let Some(freeze) = self.session.rest()? {
            self.freeze = Some(freeze);
            output::frozen(freeze, self.json)?;
        }
        Ok(())
    }

    /// What went wrong with the stream, and what QEMU says about it.
    fn explained(&mut self, what: &str) -> Failure {
        let until = Instant::now() + EXPLANATION;
        while Instant::now() < until {
            match self.session.ask() {
                Ok(Stage::Active | Stage::Ready) => {}
                Ok(Stage::Failed(why)) => return format!("{what}; QEMU says: {why}").into(),
                Ok(Stage::Completed) => break,
                Err(error) => return format!("{what}; {error}").into(),
            }
            // Asked again above.
            let _ = self.session.look();
        }
        what.into()
    }
}
