//! Memory that is still being loaded is frozen at once: what is saved is what it was at the freeze point, and what is
//! missing comes straight from the source.

mod behind;
#[path = "../common/mod.rs"]
mod common;
mod discard;
mod guest;

use std::sync::Arc;
use std::time::Duration;

use common::collector::{Collector, layout};
use common::discards::give_back;
use common::{Kind, Memory, freezable_while_loading};
use guest::Guest;
use page_source::{OneShot, PageSink, Source};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::faults::{Altered, Fault, FaultySource};
use testkit::gate::Gate;
use testkit::hugepages::Overcommit;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;
use uffd_engine::{
    Background, Discards, Engine, EngineError, FailurePolicy, FreezeError, FreezeOptions, FreezeStats, Freezer, Frozen,
    FrozenError, Handlers,
};

fn save(frozen: Frozen, expected: &[Vec<u8>], layout: &Layout) -> FreezeStats {
    let sink = Collector::new(layout, None, u64::MAX);
    let handle = frozen.handle();
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    let complete = sink.complete();
    let stats = handle.wait().unwrap();
    assert!(complete);
    sink.assert_equals(expected);
    drop(feed);
    assert_eq!(stats.pages + stats.zero_pages, layout.total().to_pages().0, "{stats:?}");
    stats
}

fn sources(seed: u64, oracle: &Arc<Oracle>) -> Source {
    let oracle = Arc::clone(oracle);
    match seed % 4 {
        0 => Arc::new(MemorySource::new(oracle)).into(),
        1 => Arc::new(MemorySource::new(oracle).knowing_nothing()).into(),
        2 => Arc::new(LateSource::new(oracle, seed).with_threads(2)).into(),
        _ => Box::new(LateSource::new(oracle, seed).sending_each_page_once()).into(),
    }
}

/// Two snapshots, one after the other, of a guest that writes while its memory comes.
fn two_snapshots(seed: u64, kind: Kind) {
    let mut random = StdRng::seed_from_u64(seed);
    let huge = !matches!(kind, Kind::Anonymous | Kind::MemfdShared);
    let pages: &[u64] = if huge { &[1024, 512] } else { &[3000, 700] };
    let oracle = Arc::new(Oracle::random(seed, layout(pages), random.random_range(40..=255)));
    let memory = Memory::new(kind, oracle.layout());
    let background = Background::default().with_piece(PageCount(32)).with_window(PageCount(64));
    let engine = memory
        .engine(sources(seed, &oracle))
        .handlers(Handlers::threads(random.random_range(1..=2)))
        .background(if random.random() { background } else { background.paused() })
        .discards(if random.random() { Discards::Events } else { Discards::Announced })
        .start()
        .unwrap();
    let guest = Guest::new(&memory, &oracle);
    let pool = ByteLen(if random.random() { 4 << 20 } else { 1 });
    guest.runs(seed, || {
        for _ in 0..2 {
            guest.progress(random.random_range(0..40));
            match guest.freeze(&engine, pool) {
                (Ok(frozen), expected) => drop(save(frozen, &expected, oracle.layout())),
                (Err(error), _) => panic!("seed {seed}, {kind:?}: {error}"),
            }
        }
        engine.resume_background();
        engine.wait().unwrap();
    });
    guest.assert_memory();
}

#[test]
fn what_is_saved_is_what_was_there_at_the_freeze_point() {
    testkit::require!(Userfaultfd);
    let kinds = freezable_while_loading(&[Kind::Anonymous, Kind::MemfdShared]);
    for (number, seed) in seeds(48) {
        two_snapshots(seed, kinds[usize::try_from(number / 4).unwrap() % kinds.len()]);
    }
}

#[test]
fn huge_pages_that_are_loading_are_frozen() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    let kinds = freezable_while_loading(&[Kind::HugetlbPrivate, Kind::HugetlbShared, Kind::HugetlbAlias]);
    for (number, seed) in seeds(24) {
        two_snapshots(seed, kinds[usize::try_from(number / 4).unwrap() % kinds.len()]);
    }
}

fn paused(memory: &Memory, source: impl Into<Source>) -> Engine {
    memory.engine(source).background(Background::default().paused()).start().unwrap()
}

#[test]
fn nothing_is_brought_into_memory_for_it() {
    testkit::require!(Userfaultfd);
    for kind in freezable_while_loading(&[Kind::Anonymous, Kind::MemfdShared]) {
        let oracle = Arc::new(Oracle::random(3, layout(&[4096]), 200));
        let memory = Memory::new(kind, oracle.layout());
        let engine = paused(&memory, Arc::new(MemorySource::new(Arc::clone(&oracle))));
        let guest = Guest::new(&memory, &oracle);
        for page in [0, 77, 4095] {
            guest.write(BlockId(0), PageIndex(page), 5);
        }
        let touched = [0, 77, 4095].iter().filter(|&&page| !oracle.zero_at(BlockId(0), PageIndex(page))).count() as u64;
        // They are counted after their waiters go on.
        while engine.stats().demand_pages < touched {
            std::thread::yield_now();
        }
        let before = engine.stats();
        let (frozen, expected) = guest.freeze(&engine, ByteLen(1 << 20));
        let stats = save(frozen.unwrap(), &expected, oracle.layout());
        let after = engine.stats();
        assert_eq!(after.demand_faults, before.demand_faults, "a page fault for the snapshot");
        assert_eq!((after.demand_pages, after.background_pages), (before.demand_pages, 0));
        // At most a few zero pages more than the three that are there.
        assert!(memory.resident() <= ByteLen(64 * 4096), "{kind:?}: {}", memory.resident());
        assert_eq!(stats.pages_from_source, oracle.stored_pages().0 - touched, "{stats:?}");
        engine.resume_background();
        engine.wait().unwrap();
        guest.assert_memory();
    }
}

#[test]
fn an_engine_is_complete_only_after_the_freeze() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(4, layout(&[600]), 200));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = paused(&memory, Arc::new(MemorySource::new(Arc::clone(&oracle))));
    let guest = Guest::new(&memory, &oracle);
    let (frozen, expected) = guest.freeze(&engine, ByteLen(1 << 20));
    let frozen = frozen.unwrap();
    // All of it is loaded, and written to, while the sink stands still.
    let gate = Gate::closed();
    let sink = Collector::new(oracle.layout(), Some(gate.clone()), u64::MAX);
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    gate.wait_for(1);
    engine.resume_background();
    for page in 0..200 {
        guest.write(BlockId(0), PageIndex(page), 99);
    }
    while engine.stats().background_pages + engine.stats().demand_pages < oracle.stored_pages().0 {
        std::thread::yield_now();
    }
    assert!(engine.wait_for(Duration::from_millis(20)).is_none(), "complete while frozen");
    gate.open();
    assert!(sink.complete());
    sink.assert_equals(&expected);
    engine.wait().unwrap();
    guest.assert_memory();
    drop(feed);
    // From now on it is ordinary memory, and frozen as such, with its engine or without it.
    let options = FreezeOptions::default();
    let freezers = [
        engine.freezer(memory.regions(), memory.layout.clone(), &options),
        Freezer::prepare(memory.regions(), memory.layout.clone(), &options),
    ];
    for freezer in freezers {
        let frozen = freezer.unwrap().arm().unwrap();
        let expected = guest.model.lock().clone();
        save(frozen, &expected, oracle.layout());
    }
}

#[test]
fn one_that_is_given_up_changes_nothing() {
    testkit::require!(Userfaultfd);
    for kind in freezable_while_loading(&[Kind::Anonymous, Kind::MemfdShared]) {
        for (number, seed) in seeds(12) {
            let oracle = Arc::new(Oracle::random(seed, layout(&[1500]), 220));
            let memory = Memory::new(kind, oracle.layout());
            let engine = paused(&memory, sources(seed, &oracle));
            let guest = Guest::new(&memory, &oracle);
            guest.runs(seed, || {
                let (frozen, _) = guest.freeze(&engine, ByteLen(1));
                let frozen = frozen.unwrap();
                // There is one buffer: writers wait when it is given up.
                while frozen.stats().waits_for_pool == 0 {
                    std::thread::yield_now();
                }
                match number % 3 {
                    0 => drop(frozen),
                    1 => {
                        frozen.cancel();
                        assert!(matches!(frozen.wait(), Err(FrozenError::Cancelled)));
                    }
                    _ => {
                        let sink = Collector::new(oracle.layout(), None, number / 3);
                        let handle = frozen.handle();
                        let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
                        assert!(!sink.complete());
                        assert!(matches!(handle.wait(), Err(FrozenError::Sink(_))));
                        drop(feed);
                    }
                }
                guest.progress(50);
                let (frozen, expected) = guest.freeze(&engine, ByteLen(1 << 16));
                // With some luck the guest has touched everything: it is complete then.
                if let Ok(frozen) = frozen {
                    save(frozen, &expected, oracle.layout());
                }
                engine.resume_background();
                engine.wait().unwrap();
            });
            guest.assert_memory();
        }
    }
}

#[test]
fn a_second_freeze_at_the_same_time_and_other_regions_are_refused() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(5, layout(&[64, 64]), 200));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = paused(&memory, Arc::new(MemorySource::new(Arc::clone(&oracle))));
    let guest = Guest::new(&memory, &oracle);
    let (first, expected) = guest.freeze(&engine, ByteLen(1 << 16));
    let (second, _) = guest.freeze(&engine, ByteLen(1 << 16));
    assert!(matches!(second, Err(FreezeError::Busy)));
    let less = engine.freezer(memory.regions()[..1].to_vec(), memory.layout.clone(), &FreezeOptions::default());
    assert!(matches!(less, Err(FreezeError::OtherRegions { .. })));
    save(first.unwrap(), &expected, oracle.layout());
}

/// Freezes untouched memory over a source, and delivers it: how that fails.
fn failure(source: impl Into<Source>, oracle: &Arc<Oracle>, meanwhile: impl FnOnce(&Memory, &Engine)) -> FrozenError {
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = memory
        .engine(source)
        .background(Background::default().paused())
        .on_failure(FailurePolicy::PoisonFailed)
        .start()
        .unwrap();
    let guest = Guest::new(&memory, oracle);
    let (frozen, _) = guest.freeze(&engine, ByteLen(1 << 16));
    let frozen = frozen.unwrap();
    meanwhile(&memory, &engine);
    let sink = Collector::new(oracle.layout(), None, u64::MAX);
    let handle = frozen.handle();
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    assert!(!sink.complete(), "nothing is published");
    let error = handle.wait().unwrap_err();
    drop((feed, engine));
    error
}

#[test]
fn what_can_not_be_had_fails_the_snapshot() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(9, layout(&[300]), 255));
    let source = || Arc::new(MemorySource::new(Arc::clone(&oracle)));
    for fault in [Fault::Error, Fault::Short, Fault::Broken, Fault::Silence] {
        let faulty = Arc::new(FaultySource::new(source(), 2, fault.clone()));
        let error = failure(faulty, &oracle, |_, _| {});
        assert!(matches!(error, FrozenError::Source { .. }), "{fault:?}: {error}");
    }
    let error = failure(Arc::new(Altered::new(MemorySource::new(Arc::clone(&oracle)))), &oracle, |_, _| {});
    assert!(matches!(error, FrozenError::Changed(_)), "{error}");
    let error = failure(source(), &oracle, |_, engine| engine.cancel());
    assert!(matches!(&error, FrozenError::Engine(why) if matches!(**why, EngineError::Cancelled)), "{error}");
    // The first run that is delivered is that of this fault: its page is poisoned, and the engine goes on.
    let faulty = Arc::new(FaultySource::new(source(), 0, Fault::Error));
    let error = failure(faulty, &oracle, |memory, _| {
        memory.read(BlockId(0), PageIndex(7)).unwrap_err();
    });
    assert!(matches!(error, FrozenError::Poisoned(run) if run.first == PageIndex(7)), "{error}");
}

#[test]
fn memory_that_is_given_back_before_it_is_saved_fails_the_snapshot() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(10, layout(&[300]), 255));
    let source = || Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let run = PageRun::new(BlockId(0), PageIndex(16), PageCount(16));
    let error = failure(source(), &oracle, |memory, engine| {
        give_back(memory, run);
        assert!(memory.load(BlockId(0), PageIndex(20)).iter().all(|&byte| byte == 0));
        engine.resume_background();
        engine.wait().unwrap();
        assert!(memory.load(BlockId(0), PageIndex(21)).iter().all(|&byte| byte == 0));
        assert!(memory.load(BlockId(0), PageIndex(40)) == oracle.run(PageRun::single(BlockId(0), PageIndex(40))));
    });
    assert!(matches!(error, FrozenError::Discarded { .. }), "{error}");
}

#[test]
fn an_engine_that_is_dropped_ends_the_freeze() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(11, layout(&[300]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = paused(&memory, Arc::new(LateSource::new(Arc::clone(&oracle), 1)));
    let guest = Guest::new(&memory, &oracle);
    let (frozen, _) = guest.freeze(&engine, ByteLen(1 << 16));
    let frozen = frozen.unwrap();
    drop(engine);
    assert!(matches!(frozen.wait(), Err(FrozenError::Engine(why)) if matches!(*why, EngineError::Cancelled)));
    assert!(memory.read(BlockId(0), PageIndex(1)).is_err(), "poisoned, not zero");
    drop(frozen);
    assert!(memory.read(BlockId(0), PageIndex(2)).is_err(), "poisoned, not zero");
}

#[test]
fn plain_freezing_does_not_take_memory_from_an_engine() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(8, layout(&[256]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = paused(&memory, Arc::new(MemorySource::new(Arc::clone(&oracle))));
    let freezer = Freezer::prepare(memory.regions(), memory.layout.clone(), &FreezeOptions::default()).unwrap();
    assert!(matches!(freezer.arm(), Err(FreezeError::Arm { errno, .. }) if errno.number() == libc::EBUSY));
    engine.resume_background();
    engine.wait().unwrap();
    memory.assert_equals(&oracle);
}
