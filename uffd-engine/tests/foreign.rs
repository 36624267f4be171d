//! Memory of another process, whose userfaultfd was handed over: nothing but the ioctls touches it.

mod common;

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::{Kind, Memory};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use page_source::{BlockId, HostAddr, Layout, PageCount, PageIndex, PageRun, PageSize, PageSource, RamBlock};
use testkit::faults::{Fault, FaultySource};
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Backing, Descriptor, Engine, EngineError, Features, Region};
use userfaultfd::{FeatureFlags, UffdBuilder};

const PAGES: u64 = 2048;
const ROLE: &str = "UFFD_ENGINE_TEST_ROLE";

fn oracle() -> Arc<Oracle> {
    let block = RamBlock::new("ram", PageCount(PAGES).to_bytes(), PageSize::SMALL).unwrap();
    Arc::new(Oracle::random(99, Layout::new(vec![block]).unwrap(), 128))
}

/// The other process: makes memory and a userfaultfd, hands that over, and then does what it is told, a line each.
#[test]
fn the_other_process() {
    let Some(path) = std::env::var_os(ROLE) else { return };
    let oracle = oracle();
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::EVENT_REMOVE)
        .create()
        .unwrap();
    let map = &memory.maps[0];
    uffd.register(map.as_ptr().cast(), map.size()).unwrap();
    let mut socket = UnixStream::connect(Path::new(&path)).unwrap();
    let fds = [uffd.as_raw_fd()];
    let addr = memory.addr(BlockId(0)).0.to_be_bytes();
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&addr)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    drop(uffd);
    let lines = BufReader::new(socket.try_clone().unwrap()).lines();
    for line in lines {
        let answer = match line.unwrap().as_str() {
            "compare" => {
                memory.assert_equals(&oracle);
                "equal".to_owned()
            }
            "discard" => {
                discard(&memory);
                let zero = memory.load(BlockId(0), PageIndex(3)).iter().all(|&byte| byte == 0);
                format!("zero {zero}")
            }
            "count" => {
                let mut refused = 0;
                for page in 0..PAGES {
                    match memory.read(BlockId(0), PageIndex(page)) {
                        Ok(bytes) => assert!(bytes == oracle.run(PageRun::single(BlockId(0), PageIndex(page)))),
                        Err(_) => refused += 1,
                    }
                }
                format!("refused {}", refused > 0)
            }
            other => panic!("unknown: {other}"),
        };
        writeln!(socket, "{answer}").unwrap();
    }
}

#[expect(unsafe_code, reason = "a discard as a VMM does it")]
fn discard(memory: &Memory) {
    let at = usize::try_from(memory.addr(BlockId(0)).0).unwrap();
    let at = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap();
    // SAFETY: pages of the test's own mapping, of which nothing is borrowed.
    unsafe { nix::sys::mman::madvise(at, 16 * 4096, nix::sys::mman::MmapAdvise::MADV_DONTNEED) }.unwrap();
}

struct Peer {
    process: Child,
    socket: UnixStream,
    region: Region,
    descriptor: Option<Descriptor>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Peer {
    fn start(oracle: &Oracle) -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["the_other_process", "--exact"])
            .env(ROLE, &path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (socket, _) = listener.accept().unwrap();
        let mut addr = [0; 8];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut fd = None;
        {
            let mut slices = [IoSliceMut::new(&mut addr)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
            for part in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(fds) = part {
                    fd = Some(owned(fds[0]));
                }
            }
        }
        let descriptor = Descriptor::handed_over(fd.unwrap(), Features::EVENT_REMOVE).unwrap();
        let run = oracle.layout().run_of(BlockId(0)).unwrap();
        let region = Region::new(HostAddr(u64::from_be_bytes(addr)), run, Backing::Anonymous);
        Peer { process, socket, region, descriptor: Some(descriptor) }
    }

    fn engine(&mut self, source: Arc<dyn PageSource>, background: Background) -> Engine {
        Engine::builder()
            .descriptor(self.descriptor.take().unwrap())
            .region(self.region.clone())
            .source(source)
            .background(background)
            .start()
            .unwrap()
    }

    fn ask(&mut self, what: &str) -> String {
        writeln!(self.socket, "{what}").unwrap();
        let mut line = String::new();
        BufReader::new(&self.socket).read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

#[expect(unsafe_code, reason = "a descriptor that has just arrived")]
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just put it into our table, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[test]
fn every_byte_arrives_in_another_process() {
    testkit::require!(Userfaultfd);
    for background in [Background::off(), Background::default()] {
        let complete = background != Background::off();
        let oracle = oracle();
        let mut peer = Peer::start(&oracle);
        let engine = peer.engine(Arc::new(MemorySource::new(Arc::clone(&oracle))), background);
        assert_eq!(peer.ask("compare"), "equal");
        if complete {
            engine.wait().unwrap();
        }
        assert_eq!(peer.ask("discard"), "zero true");
    }
}

#[test]
fn a_discard_in_another_process_is_seen() {
    testkit::require!(Userfaultfd);
    let oracle = oracle();
    let mut peer = Peer::start(&oracle);
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let engine = peer.engine(source, Background::default().paused());
    assert_eq!(peer.ask("discard"), "zero true");
    engine.resume_background();
    engine.wait().unwrap();
    assert_eq!(engine.stats().removed_pages, 16);
    assert!(engine.discard(PageRun::single(BlockId(0), PageIndex(0))).is_err(), "not ours to give back");
}

#[test]
fn a_failure_poisons_memory_of_another_process() {
    testkit::require!(Userfaultfd);
    let oracle = oracle();
    let mut peer = Peer::start(&oracle);
    let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 4, Fault::Error);
    let engine = peer.engine(Arc::new(source), Background::default().with_piece(PageCount(32)));
    assert!(engine.wait().is_err());
    drop(engine);
    assert_eq!(peer.ask("count"), "refused true");
}

#[test]
fn a_process_that_dies_ends_its_engine() {
    testkit::require!(Userfaultfd);
    let oracle = oracle();
    let mut peer = Peer::start(&oracle);
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let engine = peer.engine(source, Background::default().paused());
    peer.process.kill().unwrap();
    peer.process.wait().unwrap();
    engine.resume_background();
    assert!(matches!(engine.wait(), Err(EngineError::OwnerGone)));
}
