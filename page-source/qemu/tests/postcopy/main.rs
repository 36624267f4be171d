//! The postcopy server against a destination that keeps QEMU's rules and complains of every breach.

mod codec;
mod conversation;
mod door;
mod stub;
mod trace;
mod trouble;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use door::Door;
use nix::sys::socket::{MsgFlags, recv};
use page_source::PageSource;
use page_units::{BlockId, ByteLen, Layout, PageIndex, PageSize, RamBlock};
use qemu_pages::serve::{Address, Opening, Options, Phase, Report, ServeError, Server, Started};
use qemu_pages::wire::return_path::Message;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use stub::{Habits, LIMIT, State, Stub};
use testkit::faults::{Fault, FaultySource};
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;
use vmstate::Configuration;

/// The device state, as far as it matters here.
const DEVICES: &[u8] = b"devices";

fn opening() -> Opening {
    opening_with(DEVICES)
}

fn opening_with(devices: &[u8]) -> Opening {
    Opening { configuration: Configuration::new("machine"), early: Vec::new(), devices: devices.to_vec() }
}

fn small(lengths: &[(&str, u64)]) -> Layout {
    let block = |(name, pages): &(&str, u64)| RamBlock::new(*name, ByteLen(pages * 4096), PageSize::SMALL).unwrap();
    Layout::new(lengths.iter().map(block).collect()).unwrap()
}

fn oracle(seed: u64) -> Arc<Oracle> {
    Arc::new(Oracle::random(seed, small(&[("ram", 1500), ("rom", 70), ("one", 1)]), 128))
}

/// A server in a thread.
struct Running {
    control: qemu_pages::serve::Control,
    thread: thread::JoinHandle<Result<Report, ServeError>>,
}

impl Running {
    fn new(server: Server, run: impl FnOnce(Server) -> Result<Report, ServeError> + Send + 'static) -> Running {
        Running { control: server.control(), thread: thread::spawn(move || run(server)) }
    }

    fn start(source: Arc<dyn PageSource>, options: Options, to: Address) -> Running {
        let server = Server::new(source, &HashMap::new(), options).unwrap();
        Running::new(server, move |server| server.start(&to, &opening()))
    }

    fn finish(self) -> Result<Report, ServeError> {
        self.thread.join().unwrap()
    }
}

fn options(change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options::default();
    change(&mut options);
    options
}

/// Everything that is not zero has come, and is right; a zero page has come only if it was asked for.
fn check(state: &State, oracle: &Oracle) {
    assert_eq!(state.wrong, None);
    assert!(state.ended);
    for (id, block) in oracle.layout().iter() {
        for page in 0..block.pages().0 {
            let key = (block.name().to_owned(), page);
            if oracle.zero_at(id, PageIndex(page)) {
                assert!(!state.pages.contains_key(&key), "{key:?}");
                assert!(!state.zeros.contains(&key) || state.requested.contains(&key), "{key:?} was not asked for");
            } else {
                let at = usize::try_from(page * 4096).unwrap();
                let expected = &oracle.block(id)[at..at + 4096];
                assert!(state.pages.get(&key).is_some_and(|page| page == expected), "{key:?}");
            }
        }
    }
}

/// A random page.
fn any_page(random: &mut StdRng, oracle: &Oracle) -> (String, u64) {
    let blocks = oracle.layout().blocks();
    let block = &blocks[random.random_range(0..blocks.len())];
    (block.name().to_owned(), random.random_range(0..block.pages().0))
}

fn serves(seed: u64, source: Arc<dyn PageSource>, oracle: &Oracle, preempt: bool, tcp: bool) {
    let dir = tempfile::tempdir().unwrap();
    let (door, address) = if tcp { Door::tcp() } else { Door::unix(dir.path()) };
    let mut random = StdRng::seed_from_u64(seed);
    let while_loading = (0..5).map(|_| any_page(&mut random, oracle)).collect();
    let stub = Stub::open(door, Habits { preempt, while_loading, ..Habits::default() });
    let server = Running::start(source, options(|options| options.preempt = preempt), address);
    let mut asked = Vec::new();
    stub.wait("the package", |state| state.loaded);
    for _ in 0..60 {
        let (block, page) = any_page(&mut random, oracle);
        if stub.state().ended {
            break;
        }
        stub.request(&block, page, 1);
        asked.push((block, page));
    }
    for page in &asked {
        stub.wait("a page that was asked for", |state| {
            state.pages.contains_key(page) || state.zeros.contains(page) || state.ended
        });
    }
    let report = server.finish().unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    let state = stub.finish();
    check(&state, oracle);
    let stored = oracle.stored_pages();
    assert_eq!(report.progress.demand.0 + report.progress.background.0, stored.0);
    assert_eq!(report.progress.zero.0, state.zeros.len() as u64);
    assert_eq!(report.progress.phase, Phase::Finishing);
    assert!(report.to_started.is_some_and(|started| started <= report.to_complete));
    if !preempt {
        assert!(state.order.iter().all(|(.., fast)| !fast));
    }
}

#[test]
fn every_page_of_memory_is_sent_once() {
    for (number, seed) in seeds(8) {
        let oracle = oracle(seed);
        let source = MemorySource::new(Arc::clone(&oracle));
        let source = if number % 2 == 0 { source } else { source.knowing_nothing() };
        serves(seed, Arc::new(source), &oracle, number & 2 != 0, number & 4 != 0);
    }
}

#[test]
fn every_page_once_from_a_source_that_answers_late_and_out_of_order() {
    for (number, seed) in seeds(8) {
        let oracle = oracle(seed);
        let source = LateSource::new(Arc::clone(&oracle), seed).with_threads(2).with_unasked(number & 1 != 0);
        serves(seed, Arc::new(source), &oracle, number & 2 != 0, number & 4 != 0);
    }
}

#[test]
fn huge_pages_go_as_a_whole() {
    let layout = small(&[("ram", 512 * 6), ("rom", 70)]);
    let mut content = Oracle::zero(layout);
    let mut random = StdRng::seed_from_u64(1);
    for page in [0u64, 3, 511, 512, 2 * 512 + 17, 4 * 512 + 100] {
        let at = usize::try_from(page * 4096).unwrap();
        content.block_mut(BlockId(0))[at..at + 4096].fill_with(|| random.random());
    }
    content.block_mut(BlockId(1)).fill(7);
    let oracle = Arc::new(content);
    let sources: [Arc<dyn PageSource>; 2] = [
        Arc::new(MemorySource::new(Arc::clone(&oracle))),
        Arc::new(LateSource::new(Arc::clone(&oracle), 3).with_threads(2)),
    ];
    for source in sources {
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let huge = HashMap::from([("ram".to_owned(), 512)]);
        let while_loading = vec![("ram".to_owned(), 2 * 512 + 1), ("ram".to_owned(), 3 * 512)];
        let stub = Stub::open(door, Habits { huge, while_loading, ..Habits::default() });
        let sizes = HashMap::from([("ram".to_owned(), PageSize::HUGE)]);
        let server = Server::new(source, &sizes, Options::default()).unwrap();
        let server = Running::new(server, move |server| server.start(&address, &opening()));
        server.finish().unwrap();
        let state = stub.finish();
        assert_eq!(state.wrong, None);
        for page in 0..512 * 6 {
            let at = usize::try_from(page * 4096).unwrap();
            let (key, expected) = (("ram".to_owned(), page), &oracle.block(BlockId(0))[at..at + 4096]);
            match state.pages.get(&key) {
                Some(content) => assert!(content == expected, "{page}"),
                None => assert!(expected.iter().all(|byte| *byte == 0), "{page}"),
            }
        }
        // The one that was asked for came though it is zero; the last, which nobody asked for, did not.
        assert!((3 * 512..4 * 512).all(|page| state.zeros.contains(&("ram".to_owned(), page))));
        assert!((5 * 512..6 * 512).all(|page| !state.zeros.contains(&("ram".to_owned(), page))));
        assert_eq!(state.pages.keys().filter(|(name, _)| name == "rom").count(), 70);
    }
}

#[test]
fn the_background_follows_requests() {
    let mut content = Oracle::zero(small(&[("ram", 4000)]));
    content.block_mut(BlockId(0)).fill(1);
    let oracle = Arc::new(content);
    let (door, address) = Door::tcp();
    // No credit comes back, so nothing but the window is sent in the background.
    let stub = Stub::open(door, Habits { keeps_pongs: true, ..Habits::default() });
    let server = Running::start(Arc::new(MemorySource::new(Arc::clone(&oracle))), Options::default(), address);
    stub.wait("the package", |state| !state.order.is_empty() || state.loaded);
    stub.say(&Message::Pong(3));
    stub.wait("the background", |state| state.order.len() >= 48);
    assert!(stub.state().order.len() <= 64, "more than 256 KiB under way");
    stub.request("ram", 3000, 1);
    stub.wait("the page", |state| state.pages.contains_key(&("ram".to_owned(), 3000)));
    let before = stub.state().order.iter().position(|(_, page, _)| *page == 3000).unwrap();
    assert!(before <= 64);
    // Credit for everything so far: the background goes on behind the request.
    for number in 1..100 {
        stub.say(&Message::Pong((1 << 31) | number));
    }
    stub.wait("more of the background", |state| state.order.len() > before + 8);
    let after: Vec<u64> = stub.state().order[before + 1..].iter().map(|(_, page, _)| *page).collect();
    assert!(after.contains(&3001), "{after:?}");
    server.control.stop();
    assert!(matches!(server.finish(), Err(ServeError::Stopped { started: Started::Yes })));
    stub.finish();
}

#[test]
fn on_a_unix_socket_no_more_than_the_window_is_under_way() {
    let mut content = Oracle::zero(small(&[("ram", 2000)]));
    content.block_mut(BlockId(0)).fill(1);
    let oracle = Arc::new(content);
    for window in [Options::default().window, ByteLen(64 << 10)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        let door = UnixListener::bind(&path).unwrap();
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let server = Running::start(source, options(|options| options.window = window), Address::Unix(path));
        let (mut main, _) = door.accept().unwrap();
        let mut loaded = Vec::new();
        [Message::Pong(1), Message::Pong(3)].iter().for_each(|message| message.push(&mut loaded));
        main.write_all(&loaded).unwrap();
        let mut all = vec![0; 1 << 20];
        let mut under_way = |main: &UnixStream| {
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let there = recv(main.as_raw_fd(), &mut all, flags).unwrap_or(0);
            assert!(there <= window.get(), "{there} bytes under way");
            there
        };
        // A destination that is slow: it takes nothing before most of the window is used, and then takes a page at a time.
        let begun = Instant::now();
        while under_way(&main) <= window.get() / 2 {
            assert!(begun.elapsed() < LIMIT, "no more than {} bytes under way", under_way(&main));
            thread::yield_now();
        }
        let (mut taken, mut page) = (0, [0; 4096]);
        while taken < 6 << 20 {
            taken += main.read(&mut page).unwrap();
            under_way(&main);
        }
        server.control.stop();
        assert!(matches!(server.finish(), Err(ServeError::Stopped { started: Started::Yes })));
    }
}

#[test]
fn what_may_have_started_the_guest_is_not_cancelled() {
    let oracle = oracle(13);
    let start = |address| {
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let server = Server::new(source, &HashMap::new(), options(|options| options.background = false)).unwrap();
        (server.control(), move || server.start(&address, &opening()))
    };
    let dir = tempfile::tempdir().unwrap();
    let (door, address) = Door::unix(dir.path());
    let stub = Stub::open(door, Habits::default());
    let (control, run) = start(address);
    let server = thread::spawn(run);
    stub.wait("the package", |state| state.loaded);
    // Whether the server has heard of it or not.
    assert!(!control.cancel());
    control.drain();
    server.join().unwrap().unwrap();
    check(&stub.finish(), &oracle);

    let dir = tempfile::tempdir().unwrap();
    let (door, address) = Door::unix(dir.path());
    let (control, run) = start(address);
    assert!(control.cancel() && control.cancel());
    let server = thread::spawn(run);
    assert!(matches!(server.join().unwrap(), Err(ServeError::Stopped { started: Started::No })));
    drop(door);
}

#[test]
fn without_background_only_a_drain_brings_the_rest() {
    let oracle = oracle(9);
    let dir = tempfile::tempdir().unwrap();
    let (door, address) = Door::unix(dir.path());
    let stub = Stub::open(door, Habits::default());
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let server = Running::start(source, options(|options| options.background = false), address);
    stub.wait("the package", |state| state.loaded);
    stub.request("ram", 700, 3);
    stub.wait("the pages", |state| {
        (700..703).all(|page| {
            let key = ("ram".to_owned(), page);
            state.pages.contains_key(&key) || state.zeros.contains(&key)
        })
    });
    assert_eq!(stub.state().order.len(), 3);
    assert_eq!(server.control.progress().requested.0, 3);
    server.control.drain();
    server.finish().unwrap();
    check(&stub.finish(), &oracle);
}

#[test]
fn a_source_that_fails_never_becomes_zeros() {
    let faults = [(0, Fault::Error), (3, Fault::Error), (10, Fault::Short), (4, Fault::Broken), (5, Fault::Silence)];
    for (at, fault) in faults {
        let oracle = oracle(11);
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let stub = Stub::open(door, Habits::default());
        let inner = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let source = Arc::new(FaultySource::new(inner, at, fault));
        let error = Running::start(source, Options::default(), address).finish().unwrap_err();
        assert!(matches!(error, ServeError::Source { .. }), "{error}");
        assert!(error.is_recoverable());
        let state = stub.finish();
        assert!(!state.ended);
        assert_eq!(state.wrong, None);
    }
}

#[test]
fn a_hostile_destination_gets_nothing() {
    let request =
        |block: Option<&str>, start, length| Message::Request { block: block.map(str::to_owned), start, length };
    let messages = [
        request(Some("other"), 0, 4096),
        request(None, 0, 4096),
        request(Some("ram"), 1, 4096),
        request(Some("ram"), 0, 4095),
        request(Some("ram"), 0, 0),
        request(Some("ram"), 1500 * 4096, 4096),
        request(Some("ram"), u64::MAX - 4095, 4096),
        Message::Received { block: "ram".into(), bits: vec![0; 8] },
        Message::ResumeAck(1),
    ];
    for message in messages {
        let oracle = oracle(1);
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let stub = Stub::open(door, Habits::default());
        let source = Arc::new(MemorySource::new(oracle));
        let server = Running::start(source, options(|options| options.background = false), address);
        stub.wait("the package", |state| state.loaded);
        stub.say(&message);
        let error = server.finish().unwrap_err();
        assert!(matches!(error, ServeError::Protocol { .. }), "{message:?}: {error}");
        stub.finish();
    }
}

#[test]
fn a_destination_that_dies_or_refuses_is_named() {
    for refuse in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let stub = Stub::open(door, Habits::default());
        let source = Arc::new(MemorySource::new(oracle(1)));
        let server = Running::start(source, options(|options| options.background = false), address.clone());
        stub.wait("the package", |state| state.loaded);
        if refuse {
            stub.say(&Message::Shut(5));
            assert!(matches!(server.finish(), Err(ServeError::Refused { code: 5, .. })));
        } else {
            stub.close();
            let error = server.finish().unwrap_err();
            assert!(error.to_string().contains(&address.to_string()), "{error}");
            assert!(matches!(error, ServeError::Broken { .. }));
        }
        stub.finish();
    }
    let nowhere = Address::Unix("/nonexistent/socket".into());
    let error = Running::start(Arc::new(MemorySource::new(oracle(1))), Options::default(), nowhere).finish();
    assert!(matches!(error, Err(ServeError::Connect { .. })));
}

#[test]
fn a_fresh_server_resumes_from_what_the_destination_has() {
    for (number, seed) in seeds(4) {
        let preempt = number % 2 == 1;
        let oracle = Arc::new(Oracle::random(seed, small(&[("ram", 1500)]), 128));
        let mut random = StdRng::seed_from_u64(seed);
        let mut have = HashMap::new();
        for page in 0..1500u64 {
            if !oracle.zero_at(BlockId(0), PageIndex(page)) && random.random_bool(0.5) {
                let at = usize::try_from(page * 4096).unwrap();
                have.insert(("ram".to_owned(), page), oracle.block(BlockId(0))[at..at + 4096].to_vec());
            }
        }
        let before = have.len() as u64;
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let while_loading = (0..20).map(|_| any_page(&mut random, &oracle)).collect();
        let blocks = HashMap::from([("ram".to_owned(), 1500)]);
        let habits = Habits { preempt, while_loading, resumes_with: Some(have), blocks, ..Habits::default() };
        let stub = Stub::open(door, habits);
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let server = Server::new(source, &HashMap::new(), options(|options| options.preempt = preempt)).unwrap();
        let report = Running::new(server, move |server| server.resume(&address)).finish().unwrap();
        check(&stub.finish(), &oracle);
        assert_eq!(report.progress.received_before.0, before);
        assert_eq!(report.progress.demand.0 + report.progress.background.0, oracle.stored_pages().0 - before);
    }
}
