//! Memory of another process, whose userfaultfd was handed over: nothing but the ioctls touches it.

mod common;

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::discards::give_back;
use common::refused::right_or_refused;
use common::{Kind, Memory};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use page_source::PageSource;
use page_units::{BlockId, HostAddr, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use testkit::faults::{Fault, FaultySource};
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Backing, Descriptor, Engine, EngineError, Features, Region, StartError};
use userfaultfd::{FeatureFlags, RegisterMode, UffdBuilder};

const PAGES: u64 = 2048;
const HUGE_PAGES: u64 = 2 * PAGES / 512;
const ROLE: &str = "UFFD_ENGINE_TEST_ROLE";
const KIND: &str = "UFFD_ENGINE_TEST_KIND";
const KINDS: [Kind; 3] = [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbShared];

/// Two regions.
fn oracle() -> Arc<Oracle> {
    let block = |name| RamBlock::new(name, PageCount(PAGES).to_bytes(), PageSize::SMALL).unwrap();
    Arc::new(Oracle::random(99, Layout::new(vec![block("low"), block("high")]).unwrap(), 128))
}

/// What a discard covers: whole granules.
fn given_back(kind: Kind) -> PageRun {
    PageRun::new(BlockId(1), PageIndex(0), PageCount(if kind == Kind::HugetlbShared { 512 } else { 16 }))
}

/// The other process: makes memory and a userfaultfd, hands that over, and then does what it is told, a line each.
#[test]
fn the_other_process() {
    let Some(path) = std::env::var_os(ROLE) else { return };
    let kind = std::env::var(KIND).unwrap();
    let kind = KINDS.into_iter().find(|one| format!("{one:?}") == kind).unwrap();
    let oracle = oracle();
    let memory = Memory::new(kind, oracle.layout());
    let (features, mode) = match kind {
        Kind::MemfdShared => {
            (Features::MISSING_SHMEM | Features::MINOR_SHMEM, RegisterMode::MISSING | RegisterMode::MINOR)
        }
        Kind::HugetlbShared => {
            (Features::MISSING_HUGETLBFS | Features::MINOR_HUGETLBFS, RegisterMode::MISSING | RegisterMode::MINOR)
        }
        _ => (Features::empty(), RegisterMode::MISSING),
    };
    let uffd = UffdBuilder::new()
        .close_on_exec(true)
        .non_blocking(true)
        .user_mode_only(false)
        .require_features(FeatureFlags::from_bits_retain((Features::EVENT_REMOVE | features).bits()))
        .create()
        .unwrap();
    for map in &memory.maps {
        uffd.register_with_mode(map.as_ptr().cast(), map.size(), mode).unwrap();
    }
    let mut socket = UnixStream::connect(Path::new(&path)).unwrap();
    let fds = [uffd.as_raw_fd()];
    let addrs = [0, 1].map(|block| memory.addr(BlockId(block)).0.to_be_bytes());
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(addrs.as_flattened())],
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
                let run = given_back(kind);
                give_back(&memory, run);
                let zero = |page| memory.load(run.block, page).iter().all(|&byte| byte == 0);
                format!("zero {}", run.iter().all(zero))
            }
            "count" => {
                format!("refused {}", right_or_refused(&memory, &oracle) > 0)
            }
            other => panic!("unknown: {other}"),
        };
        writeln!(socket, "{answer}").unwrap();
    }
}

struct Peer {
    process: Child,
    socket: UnixStream,
    regions: Vec<Region>,
    descriptor: Option<Descriptor>,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Peer {
    fn start(kind: Kind, oracle: &Oracle) -> Peer {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["the_other_process", "--exact", "--nocapture"])
            .env(ROLE, &path)
            .env(KIND, format!("{kind:?}"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], 100u16).unwrap() == 0 {
            assert_eq!(
                process.try_wait().unwrap(),
                None,
                "{kind:?}: the other process has ended, see its standard error"
            );
        }
        let (socket, _) = listener.accept().unwrap();
        let mut addrs = [[0; 8]; 2];
        let mut space = nix::cmsg_space!([i32; 1]);
        let mut fd = None;
        {
            let mut slices = [IoSliceMut::new(addrs.as_flattened_mut())];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
            for part in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(fds) = part {
                    fd = Some(owned(fds[0]));
                }
            }
        }
        let descriptor = Descriptor::handed_over(fd.unwrap(), Features::EVENT_REMOVE).unwrap();
        let (backing, shared) = match kind {
            Kind::MemfdShared => (Backing::Memfd, true),
            Kind::HugetlbShared => (Backing::Hugetlb, true),
            _ => (Backing::Anonymous, false),
        };
        let region =
            |(addr, run)| Region::foreign(HostAddr(u64::from_be_bytes(addr)), run, backing).with_shared(shared);
        let regions = addrs.into_iter().zip(oracle.layout().runs()).map(region).collect();
        Peer { process, socket, regions, descriptor: Some(descriptor) }
    }

    fn engine(&mut self, source: Arc<dyn PageSource>, background: Background) -> Engine {
        Engine::builder()
            .descriptor(self.descriptor.take().unwrap())
            .regions(self.regions.clone())
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
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(HUGE_PAGES).unwrap();
    for kind in KINDS {
        for background in [Background::off(), Background::default()] {
            let complete = background != Background::off();
            let oracle = oracle();
            let mut peer = Peer::start(kind, &oracle);
            let engine = peer.engine(Arc::new(MemorySource::new(Arc::clone(&oracle))), background);
            assert_eq!(peer.ask("compare"), "equal", "{kind:?}");
            if complete {
                engine.wait().unwrap();
            }
            assert_eq!(peer.ask("discard"), "zero true", "{kind:?}");
        }
    }
}

#[test]
fn a_discard_in_another_process_is_seen() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(HUGE_PAGES).unwrap();
    for kind in KINDS {
        let oracle = oracle();
        let mut peer = Peer::start(kind, &oracle);
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let engine = peer.engine(source, Background::default().paused());
        assert_eq!(peer.ask("discard"), "zero true", "{kind:?}");
        engine.resume_background();
        engine.wait().unwrap();
        assert_eq!(engine.stats().removed_pages, given_back(kind).pages.0, "{kind:?}");
        assert!(engine.discard(given_back(kind)).is_err(), "not ours to give back");
    }
}

#[test]
fn a_failure_poisons_memory_of_another_process() {
    testkit::require!(Userfaultfd, Hugepages, Poison);
    let _pages = Overcommit::reserve(HUGE_PAGES).unwrap();
    for kind in KINDS {
        let oracle = oracle();
        let mut peer = Peer::start(kind, &oracle);
        let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 4, Fault::Error);
        let engine = peer.engine(Arc::new(source), Background::default().with_piece(PageCount(32)));
        assert!(engine.wait().is_err(), "{kind:?}");
        drop(engine);
        assert_eq!(peer.ask("count"), "refused true", "{kind:?}");
    }
}

/// Its owner goes on when the descriptor is closed.
#[test]
fn an_engine_that_can_not_be_made_leaves_no_zeros_behind() {
    testkit::require!(Userfaultfd, Hugepages, Poison);
    let _pages = Overcommit::reserve(HUGE_PAGES).unwrap();
    for kind in KINDS {
        let oracle = oracle();
        let mut peer = Peer::start(kind, &oracle);
        let builder = Engine::builder().descriptor(peer.descriptor.take().unwrap()).regions(peer.regions.clone());
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        // The first region twice.
        let started = builder.region(peer.regions[0].clone()).source(source).start();
        assert!(matches!(started, Err(StartError::Region { .. })), "{started:?}");
        assert_eq!(peer.ask("count"), "refused true", "{kind:?}");
    }
}

#[test]
fn a_process_that_dies_ends_its_engine() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(HUGE_PAGES).unwrap();
    for kind in KINDS {
        let oracle = oracle();
        let mut peer = Peer::start(kind, &oracle);
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let engine = peer.engine(source, Background::default().paused());
        peer.process.kill().unwrap();
        peer.process.wait().unwrap();
        engine.resume_background();
        let ended = engine.wait();
        assert!(matches!(ended, Err(EngineError::OwnerGone)), "{kind:?}: {ended:?}");
    }
}
