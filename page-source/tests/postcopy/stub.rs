//! A destination that keeps QEMU's rules, and complains where QEMU would hang, exit or lose a page without a word.

use std::collections::{HashMap, HashSet};
use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use page_source::postcopy::Address;
use page_source::postcopy::record::{Reader, Record};
use page_source::postcopy::return_path::Message;

const LIMIT: Duration = Duration::from_secs(20);

/// Where it listens.
pub(crate) enum Door {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Door {
    pub(crate) fn unix(dir: &Path) -> (Door, Address) {
        let path = dir.join("in");
        (Door::Unix(UnixListener::bind(&path).unwrap()), Address::Unix(path))
    }

    pub(crate) fn tcp() -> (Door, Address) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp(listener.local_addr().unwrap().to_string());
        (Door::Tcp(listener), address)
    }

    fn accept(&self) -> Stream {
        match self {
            Door::Unix(door) => Stream::Unix(door.accept().unwrap().0),
            Door::Tcp(door) => Stream::Tcp(door.accept().unwrap().0),
        }
    }
}

pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn again(&self) -> Stream {
        match self {
            Stream::Unix(stream) => Stream::Unix(stream.try_clone().unwrap()),
            Stream::Tcp(stream) => Stream::Tcp(stream.try_clone().unwrap()),
        }
    }

    fn close(&self) {
        let _ = match self {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(into),
            Stream::Tcp(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Tcp(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What it does beyond the ordinary.
#[derive(Clone, Default)]
pub(crate) struct Habits {
    pub(crate) preempt: bool,
    /// Pages in a huge page, for the blocks that have such.
    pub(crate) huge: HashMap<String, u64>,
    /// Faults while it loads its devices.
    pub(crate) while_loading: Vec<(String, u64)>,
    /// Answers no PING of the background.
    pub(crate) keeps_pongs: bool,
    /// What it has already: it waits to be resumed.
    pub(crate) resumes_with: Option<HashMap<(String, u64), Vec<u8>>>,
    /// The length of each block in pages, where it is resumed.
    pub(crate) blocks: HashMap<String, u64>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) pages: HashMap<(String, u64), Vec<u8>>,
    pub(crate) zeros: HashSet<(String, u64)>,
    pub(crate) requested: HashSet<(String, u64)>,
    /// In the order of arrival: block, page, on the second connection.
    pub(crate) order: Vec<(String, u64, bool)>,
    pub(crate) blocks: HashMap<String, u64>,
    pub(crate) loaded: bool,
    pub(crate) ended: bool,
    pub(crate) wrong: Option<String>,
    pub(crate) closed: bool,
    pub(crate) bytes: u64,
}

type Shared = Arc<(Mutex<State>, Condvar)>;

pub(crate) struct Stub {
    shared: Shared,
    back: Arc<Mutex<Option<Stream>>>,
    threads: Vec<JoinHandle<()>>,
    last: Mutex<Option<String>>,
}

impl Stub {
    pub(crate) fn open(door: Door, habits: Habits) -> Stub {
        let shared = Shared::default();
        let back = Arc::new(Mutex::new(None));
        let (theirs, sender) = (Arc::clone(&shared), Arc::clone(&back));
        let thread = std::thread::spawn(move || {
            let main = door.accept();
            *sender.lock().unwrap() = Some(main.again());
            let mut conversation =
                Conversation { shared: Arc::clone(&theirs), back: sender, habits, door, fast: None, discarded: false };
            if let Err(error) = conversation.run(&mut BufReader::with_capacity(1 << 16, main)) {
                let mut state = theirs.0.lock().unwrap();
                if error.kind() == std::io::ErrorKind::InvalidData {
                    state.wrong.get_or_insert(error.to_string());
                }
            }
            theirs.0.lock().unwrap().closed = true;
            theirs.1.notify_all();
            if let Some(fast) = conversation.fast.take() {
                fast.0.close();
                fast.1.join().unwrap();
            }
        });
        Stub { shared, back, threads: vec![thread], last: Mutex::default() }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }

    /// Waits for something to be true.
    pub(crate) fn wait(&self, what: &str, mut is: impl FnMut(&State) -> bool) {
        let until = Instant::now() + LIMIT;
        let mut state = self.state();
        loop {
            assert_eq!(state.wrong, None, "waiting for {what}");
            if is(&state) {
                return;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what} did not happen");
            state = self.shared.1.wait_timeout(state, left).unwrap().0;
        }
    }

    pub(crate) fn say(&self, message: &Message) {
        say(&self.back, message);
    }

    /// Asks for pages, as QEMU does: the block is named only if it is another one.
    pub(crate) fn request(&self, block: &str, first: u64, pages: u64) {
        let mut last = self.last.lock().unwrap();
        let name = (last.as_deref() != Some(block)).then(|| block.to_owned());
        *last = Some(block.to_owned());
        self.state().requested.extend((first..first + pages).map(|page| (block.to_owned(), page)));
        let length = u32::try_from(pages * 4096).unwrap();
        self.say(&Message::Request { block: name, start: first * 4096, length });
    }

    /// Dies.
    pub(crate) fn close(&self) {
        if let Some(back) = &*self.back.lock().unwrap() {
            back.close();
        }
    }

    pub(crate) fn finish(mut self) -> State {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        std::mem::take(&mut *self.shared.0.lock().unwrap())
    }
}

fn say(back: &Mutex<Option<Stream>>, message: &Message) {
    let mut bytes = Vec::new();
    message.push(&mut bytes);
    if let Some(back) = &mut *back.lock().unwrap() {
        // The server may have gone, which is what some tests want.
        let _ = back.write_all(&bytes);
    }
}

struct Conversation {
    shared: Shared,
    back: Arc<Mutex<Option<Stream>>>,
    habits: Habits,
    door: Door,
    fast: Option<(Stream, JoinHandle<()>)>,
    discarded: bool,
}

fn wrong<T>(what: impl Into<String>) -> std::io::Result<T> {
    Err(std::io::Error::new(std::io::ErrorKind::InvalidData, what.into()))
}

fn number<const N: usize>(from: &mut impl Read) -> std::io::Result<u64> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes.iter().fold(0, |all, byte| (all << 8) | u64::from(*byte)))
}

fn bytes(from: &mut impl Read, length: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn name(from: &mut impl Read) -> std::io::Result<String> {
    let length = number::<1>(from)?;
    Ok(String::from_utf8(bytes(from, length)?).unwrap())
}

impl Conversation {
    fn run(&mut self, from: &mut impl Read) -> std::io::Result<()> {
        let mut ram = None;
        let mut records = Reader::new();
        if self.habits.resumes_with.is_none() {
            if number::<4>(from)? != 0x5145_564d || number::<4>(from)? != 3 || number::<1>(from)? != 7 {
                return wrong("no header");
            }
            let length = number::<4>(from)?;
            bytes(from, length)?;
        }
        loop {
            match number::<1>(from)? {
                0 => {
                    let mut state = self.shared.0.lock().unwrap();
                    if !state.loaded {
                        return wrong("the end before the devices were loaded");
                    }
                    state.ended = true;
                    // With preempt, QEMU waits for every page that it has asked for.
                    let waiting = |state: &State| state.requested.iter().any(|page| !has(state, page));
                    while self.habits.preempt && waiting(&state) {
                        let (again, late) = self.shared.1.wait_timeout(state, LIMIT).unwrap();
                        if late.timed_out() {
                            return wrong("the end, but a page that was asked for did not come");
                        }
                        state = again;
                    }
                    drop(state);
                    self.shared.1.notify_all();
                    say(&self.back, &Message::Shut(0));
                    return Ok(());
                }
                1 => {
                    let id = number::<4>(from)?;
                    if id == 0 || name(from)? != "ram" || number::<8>(from)? != 4 {
                        return wrong("a strange section");
                    }
                    ram = Some(id);
                    self.blocks(from)?;
                    self.footer(from, id)?;
                }
                2 | 3 => {
                    let id = number::<4>(from)?;
                    if self.habits.resumes_with.is_some() {
                        ram.get_or_insert(id);
                    }
                    if ram != Some(id) {
                        return wrong("a part of no section");
                    }
                    self.take_records(from, &mut records, false)?;
                    self.footer(from, id)?;
                }
                8 => self.command(from)?,
                other => return wrong(format!("a part of kind {other}")),
            }
        }
    }

    fn footer(&self, from: &mut impl Read, id: u64) -> std::io::Result<()> {
        if number::<1>(from)? != 0x7e || number::<4>(from)? != id {
            return wrong("no footer");
        }
        Ok(())
    }

    fn blocks(&self, from: &mut impl Read) -> std::io::Result<()> {
        let word = number::<8>(from)?;
        assert_eq!(word & 0xfff, 4);
        let mut left = word & !0xfff;
        while left > 0 {
            let (name, length) = (name(from)?, number::<8>(from)?);
            if let Some(pages) = self.habits.huge.get(&name) {
                assert_eq!(number::<8>(from)?, pages * 4096);
            }
            left -= length;
            self.shared.0.lock().unwrap().blocks.insert(name, length / 4096);
        }
        assert_eq!(number::<8>(from)?, 0x10);
        Ok(())
    }

    fn command(&mut self, from: &mut impl Read) -> std::io::Result<()> {
        let (command, length) = (number::<2>(from)?, number::<2>(from)?);
        let payload = bytes(from, length)?;
        match command {
            1 | 5 => {}
            2 => {
                let ping = u32::try_from(number::<4>(&mut payload.as_slice())?).unwrap();
                if ping == 1 || !self.habits.keeps_pongs {
                    say(&self.back, &Message::Pong(ping));
                }
                if ping == 1 && self.habits.preempt {
                    self.open_fast();
                }
            }
            3 => {
                let sizes = self.habits.huge.values().fold(4096, |all, pages| all | (pages * 4096));
                let expected: Vec<u8> = [sizes, 4096].iter().flat_map(|size| size.to_be_bytes()).collect();
                assert!(payload == expected || self.habits.huge.len() == self.shared.0.lock().unwrap().blocks.len());
            }
            6 => self.discarded = true,
            7 => {
                let length = number::<4>(&mut payload.as_slice())?;
                let package = bytes(from, length)?;
                return self.package(&package);
            }
            9 => {
                say(&self.back, &Message::ResumeAck(1));
                let waiting = self.habits.while_loading.clone();
                self.ask_for(&waiting);
            }
            10 => {
                if self.habits.preempt && self.fast.is_some() {
                    return wrong("the second connection came too early");
                }
                let block = name(&mut payload.as_slice())?;
                let have = self.habits.resumes_with.clone().unwrap();
                let mut state = self.shared.0.lock().unwrap();
                state.loaded = true;
                let pages = self.habits.blocks[&block];
                let mut bits = vec![0; usize::try_from(pages.div_ceil(64) * 8).unwrap()];
                for (name, page) in have.keys().filter(|(name, _)| *name == block) {
                    bits[usize::try_from(page / 8).unwrap()] |= 1 << (page % 8);
                    state.pages.insert((name.clone(), *page), have[&(name.clone(), *page)].clone());
                }
                drop(state);
                say(&self.back, &Message::Received { block, bits });
                if self.habits.preempt && self.habits.blocks.len() == 1 {
                    self.open_fast();
                }
            }
            other => return wrong(format!("command {other}")),
        }
        Ok(())
    }

    fn ask_for(&self, pages: &[(String, u64)]) {
        for (block, page) in pages {
            let size = self.habits.huge.get(block).copied().unwrap_or(1);
            let first = page / size * size;
            let mut state = self.shared.0.lock().unwrap();
            state.requested.extend((first..first + size).map(|page| (block.clone(), page)));
            drop(state);
            let length = u32::try_from(size * 4096).unwrap();
            say(&self.back, &Message::Request { block: Some(block.clone()), start: first * 4096, length });
        }
    }

    /// Loads the package in another thread, as QEMU does: pages come meanwhile.
    fn package(&mut self, package: &[u8]) -> std::io::Result<()> {
        if !self.discarded {
            return wrong("LISTEN without a discard: QEMU hangs");
        }
        let mut listen = vec![8, 0, 4, 0, 0];
        listen.extend_from_slice(b"devices");
        listen.extend_from_slice(&[8, 0, 2, 0, 4, 0, 0, 0, 3, 8, 0, 5, 0, 0]);
        if package != listen {
            return wrong("a strange package");
        }
        let (shared, back) = (Arc::clone(&self.shared), Arc::clone(&self.back));
        self.ask_for(&self.habits.while_loading);
        let waiting = self.habits.while_loading.clone();
        std::thread::spawn(move || {
            let mut state = shared.0.lock().unwrap();
            while !state.closed && !waiting.iter().all(|page| has(&state, page)) {
                state = shared.1.wait(state).unwrap();
            }
            state.loaded = true;
            drop(state);
            shared.1.notify_all();
            say(&back, &Message::Pong(3));
        });
        Ok(())
    }

    fn open_fast(&mut self) {
        let stream = self.door.accept();
        let (mut from, shared) = (BufReader::new(stream.again()), Arc::clone(&self.shared));
        let habits = self.habits.clone();
        let thread = std::thread::spawn(move || {
            let mut records = Reader::new();
            let error = take_records(&shared, &habits, &mut from, &mut records, true).err();
            if let Some(error) = error.filter(|error| error.kind() == std::io::ErrorKind::InvalidData) {
                shared.0.lock().unwrap().wrong.get_or_insert(error.to_string());
                shared.1.notify_all();
            }
        });
        self.fast = Some((stream, thread));
    }

    fn take_records(&self, from: &mut impl Read, records: &mut Reader, fast: bool) -> std::io::Result<()> {
        take_records(&self.shared, &self.habits, from, records, fast)
    }
}

fn has(state: &State, page: &(String, u64)) -> bool {
    state.pages.contains_key(page) || state.zeros.contains(page)
}

fn take_records(
    shared: &Shared,
    habits: &Habits,
    from: &mut impl Read,
    records: &mut Reader,
    fast: bool,
) -> std::io::Result<()> {
    let mut page = [0; 4096];
    // The huge page that is being received, and how many of its parts have come.
    let mut open: Option<(String, u64, u64)> = None;
    loop {
        let record = records.next(from, &mut page)?;
        let block = records.block().to_owned();
        let mut state = shared.0.lock().unwrap();
        let index = match record {
            Record::End if open.is_some() => return wrong("the section ends inside a huge page"),
            Record::End => return Ok(()),
            Record::Page(index) | Record::Zero(index) => index.0,
        };
        let limit = state.blocks.get(&block).or(habits.blocks.get(&block)).copied();
        if limit.is_none_or(|limit| index >= limit) {
            return wrong(format!("page {index} of {block}"));
        }
        if has(&state, &(block.clone(), index)) {
            return wrong(format!("page {index} of {block} came twice"));
        }
        if let Some(size) = habits.huge.get(&block) {
            let (name, granule, parts) = open.take().unwrap_or((block.clone(), index / size, 0));
            if (&name, granule) != (&block, index / size) {
                return wrong("two huge pages mixed");
            }
            open = (parts + 1 < *size).then_some((name, granule, parts + 1));
        } else if open.is_some() {
            return wrong("a small page inside a huge one");
        }
        state.bytes += 4096;
        state.order.push((block.clone(), index, fast));
        match record {
            Record::Page(_) => _ = state.pages.insert((block, index), page.to_vec()),
            _ => _ = state.zeros.insert((block, index)),
        }
        drop(state);
        shared.1.notify_all();
    }
}
