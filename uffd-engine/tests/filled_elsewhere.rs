//! Another mapping of the memory's file touches pages that are still missing, and makes pages of zeros of them: they are
//! never taken for content.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::behind::{Act, file, happen};
use common::refused::right_or_refused;
use common::scripted::full;
use common::{HUGE, Kind, Memory, PAGE};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::hugepages::Overcommit;
use testkit::seed::seeds;
use testkit::source::MemorySource;
use uffd_engine::{Background, EngineError};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Another mapping of the file, as a device process has it.
fn elsewhere(memory: &Memory) -> MmapRegion {
    let file = file(memory, BlockId(0)).unwrap().try_clone().unwrap();
    MmapRegion::from_file(FileOffset::new(file, 0), memory.layout.total().get()).unwrap()
}

/// Who touches it, and how.
#[derive(Clone, Copy, Debug)]
enum Touch {
    Read,
    Write,
    Allocate,
}

#[test]
fn a_page_that_is_touched_elsewhere_before_its_content_comes_fails_the_engine() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    let kinds = [Kind::MemfdShared, Kind::HugetlbShared];
    let touches = [Touch::Read, Touch::Write, Touch::Allocate];
    for (number, seed) in seeds(24) {
        let mut random = StdRng::seed_from_u64(seed);
        let kind = kinds[usize::try_from(number).unwrap() % 2];
        let touch = touches[usize::try_from(number / 2).unwrap() % 3];
        let granule = if kind == Kind::MemfdShared { PAGE } else { HUGE };
        let granules: u64 = if kind == Kind::MemfdShared { 64 } else { 4 };
        let pages_in_one = (granule / PAGE) as u64;
        let oracle = full(granules * pages_in_one);
        let memory = Memory::new(kind, oracle.layout());
        let other = elsewhere(&memory);
        let on_demand: bool = random.random();
        let engine = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .background(Background::default().paused())
            .start()
            .unwrap();
        // Some are there already, and may be used by everybody.
        let there = random.random_range(0..granules / 2);
        let page = |granule: u64| PageIndex(granule * pages_in_one);
        assert!(memory.load(BlockId(0), page(there)) == oracle.run(PageRun::single(BlockId(0), page(there))));
        let mut one = [0];
        other.as_volatile_slice().read_slice(&mut one, page(there).byte_offset().get()).unwrap();
        let touched = random.random_range(granules / 2..granules);
        let at = page(touched).byte_offset().get();
        match touch {
            Touch::Read => other.as_volatile_slice().read_slice(&mut one, at).unwrap(),
            Touch::Write => other.as_volatile_slice().write_slice(&[7], at).unwrap(),
            Touch::Allocate => {
                let run = PageRun::new(BlockId(0), page(touched), PageCount(pages_in_one));
                assert!(happen(&memory, run, Act::Allocate));
            }
        }
        let what = format!("{kind:?}, {touch:?}, on demand: {on_demand}");
        if on_demand {
            assert!(memory.read(BlockId(0), page(touched)).is_err(), "{what}: it is no content");
        } else {
            engine.resume_background();
        }
        let ended = engine.wait_for(Duration::from_secs(20));
        let error = ended.unwrap_or_else(|| panic!("{what}: it goes on")).unwrap_err();
        let EngineError::FilledElsewhere { run, .. } = &error else { panic!("{what}: {error}") };
        assert!(run.contains(page(touched)), "{what}: {error}");
        drop(engine);
        assert!(right_or_refused(&memory, &oracle) > 0, "{what}");
    }
}

/// What reads as zero in the snapshot may be written to through every mapping.
#[test]
fn a_page_that_is_zero_in_the_snapshot_may_be_touched_elsewhere() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(testkit::oracle::Oracle::random(5, common::collector::layout(&[64]), 128));
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    let zero = |page: &PageIndex| oracle.zero_at(BlockId(0), *page);
    let first = (0..64).map(PageIndex).find(zero).unwrap();
    let other = elsewhere(&memory);
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .background(Background::default().paused())
        .start()
        .unwrap();
    // The engine has heard that it is zero, and has not made it: it is served next to a neighbour.
    other.as_volatile_slice().write_slice(&[0xcc; PAGE], first.byte_offset().get()).unwrap();
    engine.resume_background();
    engine.wait().unwrap();
    assert!(memory.load(BlockId(0), first).iter().all(|&byte| byte == 0xcc));
    for page in (0..64).map(PageIndex).filter(|page| *page != first) {
        assert!(memory.load(BlockId(0), page) == oracle.run(PageRun::single(BlockId(0), page)));
    }
}
