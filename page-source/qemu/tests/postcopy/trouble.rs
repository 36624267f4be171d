//! Destinations that say nothing, or too much, or take nothing; and what is said about the guest then.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, connect, listen, socket};
use page_source::PageSource;
use page_units::BlockId;
use qemu_pages::serve::{Address, Options, Phase, ServeError, Server, Started};
use qemu_pages::wire::return_path::Message;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;

use crate::door::Door;
use crate::stub::{Habits, LIMIT, Stub};
use crate::{Running, check, opening_with, options, oracle, small};

/// For destinations that never say anything: nothing has to happen in this time.
const AT_ONCE: Duration = Duration::from_millis(100);

/// For destinations that answer, and then don't: enough for what they answer, on a busy machine too.
const SOON: Duration = Duration::from_secs(3);

fn waiting(patience: Duration) -> Options {
    options(|options| options.patience = patience)
}

fn source() -> Arc<dyn PageSource> {
    Arc::new(MemorySource::new(oracle(1)))
}

/// A listener with a full queue: the next client waits.
fn full(path: &Path) -> (UnixListener, Vec<UnixStream>) {
    let listener = UnixListener::bind(path).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let waiting = vec![UnixStream::connect(path).unwrap()];
    (listener, waiting)
}

/// A connection that is asked for, and not waited for.
fn under_way(address: SocketAddr) -> OwnedFd {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    let asked = connect(fd.as_raw_fd(), &SockaddrStorage::from(address));
    assert!(matches!(asked, Ok(()) | Err(Errno::EINPROGRESS)), "{asked:?}");
    fd
}

#[test]
fn a_large_package_leaves_room_for_the_background() {
    for (seed, tcp, unasked) in [(1, true, false), (2, true, true), (3, false, false)] {
        let oracle = oracle(seed);
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = if tcp { Door::tcp() } else { Door::unix(dir.path()) };
        let devices = vec![5; 300 << 10];
        let while_loading = if unasked { vec![("ram".to_owned(), 700)] } else { Vec::new() };
        let stub = Stub::open(door, Habits { devices: Some(devices.clone()), while_loading, ..Habits::default() });
        let source: Arc<dyn PageSource> = if unasked {
            Arc::new(LateSource::new(Arc::clone(&oracle), seed).with_unasked(true))
        } else {
            Arc::new(MemorySource::new(Arc::clone(&oracle)))
        };
        let server = Server::new(source, &HashMap::new(), Options::default()).unwrap();
        let server = Running::new(server, move |server| server.start(&address, &opening_with(&devices)));
        stub.wait("the end, though nothing was asked for", |state| state.ended);
        server.finish().unwrap();
        check(&stub.finish(), &oracle);
    }
}

#[test]
fn connecting_has_a_time_limit_and_can_be_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let (listener, _waiting) = full(&path);
    let error = Running::start(source(), waiting(AT_ONCE), Address::Unix(path.clone())).finish().unwrap_err();
    assert!(matches!(error, ServeError::Connect { started: Started::No, .. }), "{error}");
    assert!(error.to_string().contains("another program") && !error.is_recoverable(), "{error}");

    // One whose guest waits is not lost.
    let server = Server::new(source(), &HashMap::new(), waiting(AT_ONCE)).unwrap();
    let to = Address::Unix(path.clone());
    let error = Running::new(server, move |server| server.resume(&to)).finish().unwrap_err();
    assert!(matches!(error, ServeError::Connect { started: Started::Yes, .. }) && error.is_recoverable(), "{error}");

    let server = Running::start(source(), Options::default(), Address::Unix(path.clone()));
    let begun = Instant::now();
    assert!(server.control.cancel());
    assert!(matches!(server.finish(), Err(ServeError::Stopped { started: Started::No })));
    assert!(begun.elapsed() < LIMIT);

    // It goes on as soon as there is space.
    let oracle = oracle(3);
    let memory = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let server = Running::start(memory, Options::default(), Address::Unix(path));
    drop(listener.accept().unwrap());
    let stub = Stub::open(Door::Unix(listener), Habits::default());
    server.finish().unwrap();
    check(&stub.finish(), &oracle);
}

#[test]
fn a_host_that_does_not_answer_is_given_up() {
    // A listener with a full queue drops what comes, as a host behind a firewall does.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let _waiting: Vec<OwnedFd> = (0..8).map(|_| under_way(address)).collect();
    for to in [address.to_string(), format!("localhost:{}", address.port())] {
        let error = Running::start(source(), waiting(AT_ONCE), Address::Tcp(to.clone())).finish().unwrap_err();
        assert!(matches!(error, ServeError::Connect { .. }), "{error}");
        let server = Running::start(source(), Options::default(), Address::Tcp(to));
        assert!(server.control.cancel());
        assert!(matches!(
            server.finish(),
            Err(ServeError::Stopped { started: Started::No }) | Err(ServeError::Connect { .. })
        ));
    }
    let error = Running::start(source(), Options::default(), Address::Tcp("127.0.0.1:1".into())).finish();
    assert!(matches!(error, Err(ServeError::Connect { .. })));
}

#[test]
fn a_destination_that_talks_instead_of_answering_is_given_up() {
    for flood in [Message::Pong(7), Message::Request { block: Some("ram".into()), start: 0, length: 4096 }] {
        for preempt in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("in");
            let listener = UnixListener::bind(&path).unwrap();
            let options = options(|options| options.preempt = preempt);
            let server = Running::start(source(), options, Address::Unix(path));
            let (mut main, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            (0..1000).for_each(|_| flood.push(&mut bytes));
            let mut written = 0;
            // Until it has had enough.
            while main.write_all(&bytes).is_ok() {
                written += 1000;
                assert!(written < 1_000_000, "{written} messages");
            }
            let error = server.finish().unwrap_err();
            assert!(matches!(error, ServeError::Protocol { started: Started::No, .. }), "{error}");
        }
    }
}

#[test]
fn one_that_never_stops_talking_does_not_keep_the_server_from_stopping() {
    for drained in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        let listener = UnixListener::bind(&path).unwrap();
        let server = Running::start(source(), options(|options| options.background = false), Address::Unix(path));
        let (mut main, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        [Message::Pong(1), Message::Pong(3)].iter().for_each(|message| message.push(&mut bytes));
        main.write_all(&bytes).unwrap();
        let flood = thread::spawn(move || {
            let mut bytes = Vec::new();
            // What takes longer to answer than to ask.
            let all = Message::Request { block: Some("ram".into()), start: 0, length: 1500 << 12 };
            (0..1000).for_each(|_| all.push(&mut bytes));
            let until = Instant::now() + LIMIT;
            while main.write_all(&bytes).is_ok() && Instant::now() < until {}
            Instant::now() < until
        });
        while server.control.progress().phase < Phase::Started {
            thread::yield_now();
        }
        if drained {
            server.control.drain();
        }
        server.control.stop();
        let ended = server.finish();
        assert!(matches!(ended, Err(ServeError::Stopped { started: Started::Yes })), "{ended:?}");
        assert!(flood.join().unwrap(), "only the end of the flood ended it");
    }
}

#[test]
fn a_silent_destination_is_given_up() {
    // It accepts, and that is all.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Running::start(source(), waiting(AT_ONCE), Address::Unix(path));
    let (_main, _) = listener.accept().unwrap();
    let error = server.finish().unwrap_err();
    assert!(matches!(error, ServeError::Silent { started: Started::No, .. }), "{error}");
    assert!(!error.is_recoverable());

    // One that is to be resumed.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::new(source(), &HashMap::new(), waiting(AT_ONCE)).unwrap();
    let server = Running::new(server, move |server| server.resume(&Address::Unix(path)));
    let (mut main, _) = listener.accept().unwrap();
    let error = server.finish().unwrap_err();
    assert!(matches!(error, ServeError::Silent { started: Started::Yes, .. }), "{error}");
    assert!(main.read(&mut [0; 9]).is_ok());
}

#[test]
fn one_that_falls_silent_is_given_up() {
    let given_up = |never_loads: bool, tcp: bool| {
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = if tcp { Door::tcp() } else { Door::unix(dir.path()) };
        let stub = Stub::open(door, Habits { never_loads, never_ends: !never_loads, ..Habits::default() });
        let error = Running::start(source(), waiting(SOON), address).finish().unwrap_err();
        let expected = if never_loads { Started::Perhaps } else { Started::Yes };
        assert!(matches!(error, ServeError::Silent { started, .. } if started == expected), "{error}");
        assert!(error.is_recoverable());
        assert_eq!(stub.finish().wrong, None);
    };
    // All of them wait at the same time.
    thread::scope(|scope| {
        for (never_loads, tcp) in [(true, false), (true, true), (false, false), (false, true)] {
            scope.spawn(move || given_up(never_loads, tcp));
        }
    });
}

#[test]
fn one_that_runs_may_be_silent_for_as_long_as_it_likes() {
    let oracle = oracle(5);
    let dir = tempfile::tempdir().unwrap();
    let (door, address) = Door::unix(dir.path());
    let stub = Stub::open(door, Habits::default());
    let memory = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let server =
        Running::start(memory, options(|options| (options.patience, options.background) = (SOON, false)), address);
    stub.wait("the package", |state| state.loaded);
    let (control, (to, ended)) = (server.control.clone(), mpsc::channel());
    let waiting = thread::spawn(move || to.send(server.finish()).unwrap());
    let early = ended.recv_timeout(SOON + SOON / 2);
    assert!(early.is_err(), "{early:?}");
    control.drain();
    ended.recv_timeout(LIMIT).unwrap().unwrap();
    waiting.join().unwrap();
    check(&stub.finish(), &oracle);
}

#[test]
fn one_that_asks_and_takes_nothing_gets_no_more_than_its_memory() {
    let mut content = Oracle::zero(small(&[("ram", 4000)]));
    content.block_mut(BlockId(0)).fill(1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let listener = UnixListener::bind(&path).unwrap();
    let memory = Arc::new(MemorySource::new(Arc::new(content)));
    let server = Running::start(memory, options(|options| options.background = false), Address::Unix(path));
    let (mut main, _) = listener.accept().unwrap();
    let mut bytes = Vec::new();
    [Message::Pong(1), Message::Pong(3)].iter().for_each(|message| message.push(&mut bytes));
    for _ in 0..3 {
        Message::Request { block: Some("ram".into()), start: 0, length: 4000 << 12 }.push(&mut bytes);
    }
    main.write_all(&bytes).unwrap();
    while server.control.progress().requested.0 < 3 * 4000 {
        thread::yield_now();
    }
    assert_eq!(server.control.progress().demand.0, 4000);
    server.control.stop();
    assert!(matches!(server.finish(), Err(ServeError::Stopped { started: Started::Yes })));
}

#[test]
fn what_ends_while_the_devices_are_loaded_may_have_started_the_guest() {
    for refuse in [None, Some(5)] {
        let dir = tempfile::tempdir().unwrap();
        let (door, address) = Door::unix(dir.path());
        let stub = Stub::open(door, Habits { never_loads: true, ..Habits::default() });
        let server = Running::start(source(), Options::default(), address);
        while server.control.progress().phase < Phase::Loading {
            thread::yield_now();
        }
        assert!(!server.control.cancel());
        match refuse {
            None => server.control.stop(),
            Some(code) => stub.say(&Message::Shut(code)),
        }
        let error = server.finish().unwrap_err();
        assert_eq!(error.started(), Started::Perhaps, "{error}");
        assert_eq!(matches!(error, ServeError::Refused { .. }), refuse.is_some(), "{error}");
        assert_eq!(stub.finish().wrong, None);
    }
}
