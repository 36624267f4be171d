//! Shared memory whose file holds pages already: they are mapped, not fetched (minor faults).

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::blocked::Thread;
use common::discards::{Way, discard, give_back};
use common::scripted::full;
use common::{Kind, Memory, PAGE};
use nix::fcntl::{FallocateFlags, fallocate};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use testkit::gate::Gate;
use testkit::source::MemorySource;
use uffd_engine::{Background, Handlers, PausePoint};

fn one(page: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(page), PageCount(1))
}

/// Writes to the file behind the memory, as another process that maps it does.
fn fill(memory: &Memory, page: u64, byte: u8) {
    let file = memory.maps[0].file_offset().unwrap().file();
    file.write_all_at(&[byte; PAGE], page * PAGE as u64).unwrap();
}

/// Cuts a page out of the file: the kernel tells nobody.
fn punch(memory: &Memory, page: u64) {
    let file = memory.maps[0].file_offset().unwrap().file();
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let page_len = i64::try_from(PAGE).unwrap();
    fallocate(file, flags, i64::try_from(page).unwrap() * page_len, page_len).unwrap();
}

#[test]
fn what_the_file_holds_is_mapped() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    for page in 8..16 {
        fill(&memory, page, 0xcc);
    }
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let engine = memory.engine(source).prefilled().background(Background::default().paused()).start().unwrap();
    for page in 4..12 {
        let held = [0xcc; PAGE];
        let right = if page < 8 { oracle.run(one(page)) } else { &held };
        assert!(memory.load(BlockId(0), PageIndex(page)) == right, "page {page}");
    }
    let stats = engine.stats();
    assert_eq!((stats.minor_faults, stats.demand_pages), (4, 4), "{stats:?}");
    engine.resume_background();
    engine.wait().unwrap();
    for page in 0..64 {
        let held = [0xcc; PAGE];
        let right = if (8..16).contains(&page) { &held } else { oracle.run(one(page)) };
        assert!(memory.load(BlockId(0), PageIndex(page)) == right, "page {page} at the end");
    }
}

/// A page that the file holds and nobody has mapped yet is given back: it is zero then, and stays so.
#[test]
fn a_cached_page_that_is_given_back_is_zero() {
    testkit::require!(Userfaultfd);
    for way in [Way::Kernel, Way::Engine, Way::EngineAnnounced] {
        let oracle = full(64);
        let memory = Memory::new(Kind::MemfdShared, oracle.layout());
        fill(&memory, 5, 0xcc);
        fill(&memory, 6, 0xcc);
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let builder = memory.engine(source).prefilled().background(Background::default().paused());
        let engine = builder.discards(way.discards()).start().unwrap();
        discard(way, &engine, &memory, one(5));
        assert!(memory.load(BlockId(0), PageIndex(5)).iter().all(|&byte| byte == 0), "{way:?}");
        assert!(memory.load(BlockId(0), PageIndex(6)).iter().all(|&byte| byte == 0xcc));
        let stats = engine.stats();
        assert_eq!((stats.minor_faults, stats.removed_pages, stats.demand_pages), (1, 1, 0), "{stats:?}");
        // What is written to the file after that is mapped as any other: a page that was given back is free again.
        discard(way, &engine, &memory, one(7));
        fill(&memory, 7, 0xdd);
        assert!(memory.load(BlockId(0), PageIndex(7)).iter().all(|&byte| byte == 0xdd), "{way:?}");
        engine.resume_background();
        engine.wait().unwrap();
        assert!(memory.load(BlockId(0), PageIndex(5)).iter().all(|&byte| byte == 0), "{way:?}");
        assert!(memory.load(BlockId(0), PageIndex(4)) == oracle.run(one(4)));
    }
}

/// A minor fault was read, and its page is cut out of the file before it is mapped: it is a missing page then, and not the
/// end of the engine.
#[test]
fn a_cached_page_that_is_gone_is_fetched() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    fill(&memory, 5, 0xcc);
    let gate = Gate::closed();
    let at_gate = gate.clone();
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .prefilled()
        .background(Background::default().paused())
        .pauses(move |point| {
            if point == PausePoint::FaultRead {
                at_gate.enter();
            }
        })
        .start()
        .unwrap();
    std::thread::scope(|scope| {
        let touching = scope.spawn(|| memory.read(BlockId(0), PageIndex(5)));
        gate.wait_for(1);
        punch(&memory, 5);
        gate.open();
        let got = touching.join().unwrap();
        assert!(engine.outcome().is_none(), "{:?}", engine.outcome());
        assert!(got.unwrap() == oracle.run(one(5)));
    });
    assert_eq!(engine.stats().minor_faults, 1);
    engine.resume_background();
    engine.wait().unwrap();
    memory.assert_equals(&oracle);
}

/// A page was given back, and the file holds it again; mapping it has to wait for another discard to be read, and then it
/// is cut out of the file once more. It is still a page that was given back: the old content never returns.
#[test]
fn a_page_that_was_given_back_stays_so_while_its_mapping_is_tried_again() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    let (claimed, applied) = (Gate::open_at_first(), Gate::open_at_first());
    let gates = (claimed.clone(), applied.clone());
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .prefilled()
        .handlers(Handlers::threads(1))
        .background(Background::default().paused())
        .pauses(move |point| match point {
            PausePoint::Claimed => gates.0.enter(),
            PausePoint::DiscardRead => gates.1.enter(),
            _ => {}
        })
        .start()
        .unwrap();
    give_back(&memory, one(5));
    // It returns when its event has been read, which is before that has been passed on.
    while engine.stats().removed_pages < 1 {
        std::thread::yield_now();
    }
    fill(&memory, 5, 0xdd);
    claimed.close();
    applied.close();
    std::thread::scope(|scope| {
        // Claimed, to be mapped; refused, since a discard of another page is unread; to be served again after that.
        let touching = scope.spawn(|| memory.read(BlockId(0), PageIndex(5)));
        claimed.wait_for(1);
        let discarding = Thread::spawn(scope, || give_back(&memory, one(9)));
        discarding.wait_for_discard();
        claimed.open();
        applied.wait_for(1);
        punch(&memory, 5);
        applied.open();
        discarding.join();
        assert!(touching.join().unwrap().unwrap().iter().all(|&byte| byte == 0), "the snapshot's page is back");
    });
    engine.resume_background();
    engine.wait().unwrap();
    assert!(memory.load(BlockId(0), PageIndex(5)).iter().all(|&byte| byte == 0));
}
