//! What a kernel lacks is done another way, or refused by name. On every kernel: `cargo xtask kernels`.

mod common;

use std::sync::Arc;

use common::collector::{Collector, layout};
use common::discards::split_off;
use common::refused::right_or_refused;
use common::{Kind, Memory, counted};
use page_source::{OneShot, PageSink, PageSource};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use testkit::faults::{Fault, FaultySource};
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::require::{Prerequisite, kernel_version};
use testkit::source::MemorySource;
use uffd_engine::{
    Background, Descriptor, Engine, FailurePolicy, Features, FreezeError, FreezeOptions, Freezer, OpenError,
};

/// README's table of kernels, as `include/uapi/linux/userfaultfd.h` tells it: the Linux that brought a feature.
const SINCE: [(Features, (u32, u32)); 8] = [
    (Features::EVENT_REMOVE, (4, 11)),
    (Features::PAGEFAULT_FLAG_WP, (5, 7)),
    (Features::MINOR_HUGETLBFS, (5, 13)),
    (Features::MINOR_SHMEM, (5, 14)),
    (Features::WP_HUGETLBFS_SHMEM, (5, 19)),
    (Features::WP_UNPOPULATED, (6, 4)),
    (Features::POISON, (6, 6)),
    (Features::MOVE, (6, 8)),
];

fn paused(memory: &Memory, source: Arc<dyn PageSource>) -> Engine {
    memory.engine(source).background(Background::default().paused()).start().unwrap()
}

fn oracle(seed: u64, pages: &[u64]) -> Arc<Oracle> {
    Arc::new(Oracle::random(seed, layout(pages), 255))
}

#[test]
fn a_kernel_has_what_the_readme_says_of_it() {
    testkit::require!(Userfaultfd);
    let features = Descriptor::kernel_features().unwrap();
    for (feature, since) in SINCE {
        assert!(kernel_version() < since || features.contains(feature), "{feature:?} is missing: {features:?}");
    }
    let readme = include_str!("../README.md");
    for (feature, (major, minor)) in SINCE.iter().filter(|(_, since)| *since > (5, 13)) {
        let row = format!("| {major}.{minor} |");
        assert!(readme.lines().any(|line| line.starts_with(&row)), "{feature:?} of {row} is not in README's table");
    }
}

/// By `UFFDIO_POISON`, or by taking every right to the pages.
#[test]
fn what_can_not_be_had_is_an_error_on_every_kernel() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(4).unwrap();
    for kind in [Kind::Anonymous, Kind::MemfdShared, Kind::MemfdPrivate, Kind::HugetlbPrivate, Kind::HugetlbAlias] {
        for policy in [FailurePolicy::PoisonMissing, FailurePolicy::PoisonFailed] {
            let oracle = oracle(1, &[1536]);
            let memory = Memory::new(kind, oracle.layout());
            let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 2, Fault::Error);
            let engine = memory
                .engine(Arc::new(source))
                .background(Background::default().paused())
                .on_failure(policy)
                .start()
                .unwrap();
            let refused = right_or_refused(&memory, &oracle);
            let one = if matches!(kind, Kind::HugetlbPrivate | Kind::HugetlbAlias) { 512 } else { 1 };
            let expected = if policy == FailurePolicy::PoisonFailed { one } else { 1536 - 2 * one };
            assert_eq!(refused, expected, "{kind:?}, {policy:?}");
            let stats = counted(&engine, |stats| stats.poisoned_pages >= expected);
            assert_eq!(stats.poisoned_pages, expected, "{kind:?}, {policy:?}");
            drop(engine);
            // Whether what is there stays, and what is not there stays refused.
            assert_eq!(right_or_refused(&memory, &oracle), expected, "{kind:?}, {policy:?}");
        }
    }
}

/// A thread that waits for a page when the engine is given up gets an error, and does not wait for ever.
#[test]
fn who_waits_for_a_page_is_told_when_the_engine_is_dropped() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let oracle = oracle(2, &[64]);
        let memory = Memory::new(kind, oracle.layout());
        let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 0, Fault::Silence);
        let engine = paused(&memory, Arc::new(source));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| memory.read(BlockId(0), PageIndex(9)));
            while engine.stats().demand_faults == 0 {
                std::thread::yield_now();
            }
            drop(engine);
            assert_eq!(waits.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT), "{kind:?}");
        });
    }
}

/// A kernel that can't map a page write-protected would lose what is written to it before it is saved.
#[test]
fn shared_memory_that_is_loading_is_frozen_or_refused_by_name() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(4).unwrap();
    let can = Prerequisite::ProtectedContinue.check().is_ok();
    for kind in [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbAlias] {
        let oracle = oracle(3, &[1024]);
        let memory = Memory::new(kind, oracle.layout());
        let engine = paused(&memory, Arc::new(MemorySource::new(Arc::clone(&oracle))));
        let freezer = engine.freezer(memory.regions(), memory.layout.clone(), &FreezeOptions::default());
        match freezer {
            Ok(_) => assert!(can || kind == Kind::Anonymous, "{kind:?}"),
            Err(FreezeError::Open(OpenError::Unsupported { missing, .. })) => {
                assert!(!can && kind != Kind::Anonymous, "{kind:?}");
                assert_eq!(missing, Features::WP_UNPOPULATED);
            }
            Err(error) => panic!("{kind:?}: {error}"),
        }
        engine.resume_background();
        engine.wait().unwrap();
        memory.assert_equals(&oracle);
    }
}

/// Before Linux 6.3 one call protects pages of one mapping only, and a region may be several: part of it was left out of
/// core dumps.
#[test]
fn memory_of_many_mappings_is_frozen_on_every_kernel() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let oracle = oracle(4, &[600]);
        let memory = Memory::new(kind, oracle.layout());
        for run in oracle.layout().runs() {
            for page in run.iter() {
                memory.store(run.block, page, oracle.run(PageRun::single(run.block, page)));
            }
        }
        for (first, pages) in [(20, 44), (100, 1), (500, 100)] {
            split_off(&memory, PageRun::new(BlockId(0), PageIndex(first), PageCount(pages)));
        }
        let options = FreezeOptions::default().with_pool(ByteLen(1 << 20));
        let freezer = Freezer::prepare(memory.regions(), memory.layout.clone(), &options).unwrap();
        let frozen = freezer.arm().unwrap();
        for page in [0, 19, 20, 63, 64, 100, 101, 599] {
            memory.store(BlockId(0), PageIndex(page), &[0x77; 8]);
        }
        let sink = Collector::new(oracle.layout(), None, u64::MAX);
        let handle = frozen.handle();
        let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
        assert!(sink.complete());
        handle.wait().unwrap();
        sink.assert_equals(&[oracle.block(BlockId(0)).to_vec()]);
        drop(feed);
    }
}
