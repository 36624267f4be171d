//! What happens behind the back of an engine whose memory is frozen while it loads: the snapshot is exact, or there is none.

use std::sync::Arc;

use page_source::{OneShot, PageSink};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use testkit::hugepages::Overcommit;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Engine, EngineError, FreezeError, FreezeOptions, Frozen, FrozenError};

use crate::common::behind::{Act, happen};
use crate::common::collector::{Collector, layout};
use crate::common::{Kind, Memory, PAGE};
use crate::guest::Guest;
use crate::save;

fn one(page: u64) -> PageRun {
    PageRun::single(BlockId(0), PageIndex(page))
}

fn load(memory: &Memory, oracle: &Arc<Oracle>) -> Engine {
    let source = Arc::new(MemorySource::new(Arc::clone(oracle)));
    memory.engine(source).background(Background::default().paused()).start().unwrap()
}

fn set(guest: &Guest<'_>, page: u64, byte: u8) {
    let at = PageIndex(page).byte_offset().get();
    guest.model.lock()[0][at..at + PAGE].fill(byte);
}

/// Delivers it: why not everything came.
fn failure(frozen: Frozen, memory: &Memory) -> FrozenError {
    let sink = Collector::new(&memory.layout, None, u64::MAX);
    let handle = frozen.handle();
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    assert!(!sink.complete(), "nothing is published");
    let error = handle.wait().unwrap_err();
    drop(feed);
    error
}

/// `MADV_FREE` tells the engine that a page is gone, and leaves it where it is: it may be written to again without a fault.
#[test]
fn a_page_that_was_freed_lazily_and_written_again_is_saved_as_it_is() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(21, layout(&[64]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = load(&memory, &oracle);
    let guest = Guest::new(&memory, &oracle);
    for page in 5..9 {
        guest.write(BlockId(0), PageIndex(page), page);
    }
    // `happen` writes 0x77 to it afterwards.
    for page in [5, 7] {
        assert!(happen(&memory, one(page), Act::FreeLazily));
        set(&guest, page, 0x77);
    }
    let (frozen, expected) = guest.freeze(&engine, ByteLen(1 << 20));
    let frozen = frozen.unwrap();
    guest.write(BlockId(0), PageIndex(5), 99);
    save(frozen, &expected, oracle.layout());
    engine.resume_background();
    engine.wait().unwrap();
    guest.assert_memory();
}

/// The engine knows of pages that they are zero, or were given back, and has nothing there; another process has written to
/// the file since.
#[test]
fn what_was_written_to_the_file_of_zero_pages_before_the_freeze_point_is_saved() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(22, layout(&[256]), 128));
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    let engine = load(&memory, &oracle);
    let guest = Guest::new(&memory, &oracle);
    let zeros: Vec<u64> = (0..256).filter(|&page| oracle.zero_at(BlockId(0), PageIndex(page))).collect();
    let stored = (0..256).find(|&page| !oracle.zero_at(BlockId(0), PageIndex(page))).unwrap();
    // Known to be zero by being asked about around a fault, and not known yet: both.
    memory.load(BlockId(0), PageIndex(zeros[0]));
    engine.discard(one(stored)).unwrap();
    set(&guest, stored, 0);
    for page in [zeros[1], zeros[zeros.len() - 1], stored] {
        assert!(happen(&memory, one(page), Act::WriteToFile));
        set(&guest, page, 0xcc);
    }
    let (frozen, expected) = guest.freeze(&engine, ByteLen(1 << 20));
    let frozen = frozen.unwrap();
    guest.write(BlockId(0), PageIndex(zeros[1]), 99);
    save(frozen, &expected, oracle.layout());
}

/// A bare `fallocate` tells nobody: a page that the engine had brought is gone.
#[test]
fn a_loaded_page_that_is_punched_before_it_is_saved_ends_the_snapshot() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    for (kind, granule) in [(Kind::MemfdShared, 1), (Kind::HugetlbShared, 512)] {
        for touched in [false, true] {
            let oracle = Arc::new(Oracle::random(23, layout(&[8 * granule]), 255));
            let memory = Memory::new(kind, oracle.layout());
            let engine = load(&memory, &oracle);
            let guest = Guest::new(&memory, &oracle);
            for page in 0..5 {
                guest.write(BlockId(0), PageIndex(page * granule), 7);
            }
            let (frozen, _) = guest.freeze(&engine, ByteLen(1 << 20));
            let frozen = frozen.unwrap();
            let lost = PageRun::new(BlockId(0), PageIndex(3 * granule), PageCount(granule));
            assert!(happen(&memory, lost, Act::Punch));
            if touched {
                memory.store(BlockId(0), lost.first, &[1]);
            }
            let error = failure(frozen, &memory);
            assert!(matches!(error, FrozenError::Discarded { .. }), "{kind:?}, touched: {touched}: {error}");
        }
    }
    // A hole that is touched is none of it.
    let oracle = Arc::new(Oracle::random(24, layout(&[64]), 128));
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    let engine = load(&memory, &oracle);
    let guest = Guest::new(&memory, &oracle);
    let (frozen, expected) = guest.freeze(&engine, ByteLen(1 << 20));
    for page in 0..64 {
        guest.write(BlockId(0), PageIndex(page), 9);
    }
    save(frozen.unwrap(), &expected, oracle.layout());
}

/// The last page comes after the preparation and before the freeze point: the memory is frozen all the same, at once.
#[test]
fn an_engine_that_becomes_complete_after_the_preparation_hands_the_memory_over() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    for kind in [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbPrivate, Kind::HugetlbShared] {
        let pages = if matches!(kind, Kind::Anonymous | Kind::MemfdShared) { 600 } else { 2048 };
        let oracle = Arc::new(Oracle::random(25, layout(&[pages]), 200));
        let memory = Memory::new(kind, oracle.layout());
        let engine = load(&memory, &oracle);
        let guest = Guest::new(&memory, &oracle);
        guest.write(BlockId(0), PageIndex(3), 5);
        let options = FreezeOptions::default();
        let freezer = engine.freezer(memory.regions(), memory.layout.clone(), &options).unwrap();
        engine.resume_background();
        engine.wait().unwrap();
        let frozen = freezer.arm().unwrap();
        let expected = guest.model.lock().clone();
        for page in (0..pages).step_by(7) {
            guest.write(BlockId(0), PageIndex(page), 77);
        }
        save(frozen, &expected, oracle.layout());
        guest.assert_memory();
    }
}

#[test]
fn an_engine_that_fails_after_the_preparation_is_named() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(26, layout(&[64]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let source = Arc::new(LateSource::new(Arc::clone(&oracle), 1));
    let engine = memory.engine(source).background(Background::default().paused()).start().unwrap();
    let options = FreezeOptions::default();
    let freezer = engine.freezer(memory.regions(), memory.layout.clone(), &options).unwrap();
    engine.cancel();
    let error = freezer.arm().unwrap_err();
    assert!(matches!(&error, FreezeError::Load(why) if matches!(**why, EngineError::Cancelled)), "{error}");
    let error = engine.freezer(memory.regions(), memory.layout.clone(), &options).unwrap_err();
    assert!(matches!(&error, FreezeError::Load(why) if matches!(**why, EngineError::Cancelled)), "{error}");
}
