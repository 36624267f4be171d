//! A region that is several mappings to the kernel: by advice, rights, locks or NUMA policy of a part of it, before and while
//! it is loaded.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::behind::{Act, happen};
use common::collector::layout;
use common::refused::right_or_refused;
use common::{HUGE_KINDS, Kind, Memory, SMALL_KINDS};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;
use uffd_engine::{Background, EngineError};

#[test]
fn a_region_of_several_mappings_is_loaded_exactly() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(48).unwrap();
    let acts = [Act::Advise, Act::ReadOnly, Act::Bind, Act::Lock];
    let kinds = SMALL_KINDS.into_iter().chain(HUGE_KINDS).cycle();
    for ((number, seed), kind) in seeds(48).zip(kinds) {
        let mut random = StdRng::seed_from_u64(seed);
        let (granule, granules) = if SMALL_KINDS.contains(&kind) { (1, 600) } else { (512, 5) };
        let oracle = Arc::new(Oracle::random(seed, layout(&[granules * granule]), random.random_range(60..=255)));
        let memory = Memory::new(kind, oracle.layout());
        let plan: Vec<(Act, PageRun, bool)> = (0..random.random_range(1..5))
            .map(|turn: u64| {
                let act = acts[usize::try_from(number / 6 + turn).unwrap() % acts.len()];
                let first = random.random_range(0..granules);
                let count = random.random_range(1..=granules - first);
                let run = PageRun::new(BlockId(0), PageIndex(first * granule), PageCount(count * granule));
                // What is locked before would be populated before, and is refused.
                (act, run, act != Act::Lock && random.random())
            })
            .collect();
        let change = |before: bool| {
            for (act, run, _) in plan.iter().filter(|(_, _, when)| *when == before) {
                happen(&memory, *run, *act);
            }
        };
        eprintln!("{kind:?} {plan:?}");
        change(true);
        let engine = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .background(Background::default().paused())
            .start()
            .unwrap();
        for _ in 0..3 {
            let page = PageIndex(random.random_range(0..granules * granule));
            assert!(memory.load(BlockId(0), page) == oracle.run(PageRun::single(BlockId(0), page)));
        }
        change(false);
        for _ in 0..3 {
            let page = PageIndex(random.random_range(0..granules * granule));
            assert!(memory.load(BlockId(0), page) == oracle.run(PageRun::single(BlockId(0), page)));
        }
        engine.resume_background();
        engine.wait().unwrap_or_else(|error| panic!("{kind:?}, {plan:?}: {error}"));
        memory.assert_equals(&oracle);
    }
}

/// Memory that is mapped over is not the engine's any more: it says so, and what is still missing of the rest is an error.
#[test]
fn a_part_that_is_mapped_over_is_named() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(3, layout(&[256]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .background(Background::default().paused())
        .start()
        .unwrap();
    let page = PageIndex(100);
    map_over(&memory, page);
    engine.resume_background();
    let error = engine.wait_for(Duration::from_secs(20)).expect("it ends").unwrap_err();
    let EngineError::Install { run, errno, .. } = &error else { panic!("{error}") };
    assert!(run.contains(page) && errno.number() == libc::ENOENT, "{error}");
    assert!(error.to_string().contains("mapped"), "{error}");
    drop(engine);
    // The new page is the test's own.
    memory.store(BlockId(0), page, oracle.run(PageRun::single(BlockId(0), page)));
    right_or_refused(&memory, &oracle);
}

fn map_over(memory: &Memory, page: PageIndex) {
    let at = (memory.addr(BlockId(0)) + page.byte_offset()).0;
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(at).unwrap());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    #[expect(unsafe_code, reason = "mapping over memory has no safe wrapper")]
    // SAFETY: a page of the test's own mapping, of which nothing is borrowed.
    let mapped = unsafe { libc::mmap(at, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert!(mapped == at);
}
