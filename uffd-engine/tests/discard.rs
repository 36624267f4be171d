//! Memory that the guest gives back reads as zero, never as what the snapshot holds: at every moment of a load.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::blocked::Thread;
use common::discards::{Way, discard, give_back};
use common::scripted::Scripted;
use common::{Kind, Memory, PAGE, counted};
use page_source::PageSource;
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use testkit::gate::Gate;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;
use uffd_engine::{Background, DiscardError, Discards, Handlers, PausePoint};

fn oracle(seed: u64, pages: u64) -> Arc<Oracle> {
    let block = RamBlock::new("ram", PageCount(pages).to_bytes(), PageSize::SMALL).unwrap();
    Arc::new(Oracle::random(seed, Layout::new(vec![block]).unwrap(), 255))
}

/// No page of it is zero.
fn full(pages: u64) -> Arc<Oracle> {
    common::scripted::full(pages)
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
}

fn bytes_of(run: PageRun) -> std::ops::Range<usize> {
    run.first.byte_offset().get()..run.end().byte_offset().get()
}

fn assert_zero(memory: &Memory, run: PageRun) {
    for page in run.iter() {
        assert!(memory.load(run.block, page).iter().all(|&byte| byte == 0), "page {page} of {run} is not zero");
    }
}

fn ways() -> impl Strategy<Value = Way> {
    prop_oneof![Just(Way::Kernel), Just(Way::Engine), Just(Way::EngineAnnounced)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: testkit::seed::cases(48), max_shrink_iters: 16, ..ProptestConfig::default() })]

    /// A writer goes through memory and keeps its own book: touches, writes and discards in any order, while the rest
    /// is being loaded by several threads.
    #[test]
    fn a_guest_that_reads_writes_and_discards_sees_only_its_own_doing(
        seed in any::<u64>(),
        kind in prop::sample::select(&common::SMALL_KINDS[..2]),
        way in ways(),
        late in any::<bool>(),
        handlers in 1..3usize,
        loaders in 0..3usize,
        steps in prop::collection::vec((0..3u8, 0..500u64, 1..12u64), 1..120),
    ) {
        testkit::require!(Userfaultfd; Ok(()));
        let oracle = oracle(seed, 512);
        let memory = Memory::new(kind, oracle.layout());
        let source: Arc<dyn PageSource> = match late {
            true => Arc::new(LateSource::new(Arc::clone(&oracle), seed).with_unasked(true)),
            false => Arc::new(MemorySource::new(Arc::clone(&oracle))),
        };
        let background = Background::default().with_piece(PageCount(8)).with_threads(loaders);

        let engine = memory
            .engine(source)
            .handlers(Handlers::threads(handlers))
            .background(if loaders == 0 { Background::off() } else { background })
            .discards(way.discards())
            .start()
            .unwrap();
        let mut book = oracle.block(BlockId(0)).to_vec();
        for (number, (what, first, pages)) in steps.into_iter().enumerate() {
            let run = run(first, pages);
            let bytes = bytes_of(run);
            match what {
                0 => {
                    discard(way, &engine, &memory, run);
                    book[bytes].fill(0);
                }
                1 => {
                    let new = vec![u8::try_from(number).unwrap() | 1; PAGE];
                    memory.store(BlockId(0), run.first, &new);
                    book[bytes.start..bytes.start + PAGE].copy_from_slice(&new);
                }
                _ => {
                    let page = bytes.start..bytes.start + PAGE;
                    prop_assert!(memory.load(BlockId(0), run.first) == book[page], "page {first} at step {number}");
                }
            }
        }
        if loaders > 0 {
            engine.wait().unwrap();
        }
        for page in 0..512u64 {
            prop_assert!(memory.load(BlockId(0), PageIndex(page)) == book[bytes_of(run(page, 1))], "page {page} at the end");
        }
    }
}

/// The loader has claimed pages and not installed them when they are given back: the discard waits, and wins.
#[test]
fn a_discard_of_pages_that_are_being_installed() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        for way in [Way::Kernel, Way::Engine, Way::EngineAnnounced] {
            let oracle = oracle(1, 64);
            let memory = Memory::new(kind, oracle.layout());
            let gate = Gate::closed();
            let at_gate = gate.clone();

            let engine = memory
                .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
                .background(Background::default().with_piece(PageCount(64)))
                .discards(way.discards())
                .pauses(move |point| {
                    if point == PausePoint::Claimed {
                        at_gate.enter();
                    }
                })
                .start()
                .unwrap();
            gate.wait_for(1);
            std::thread::scope(|scope| {
                let discarding = scope.spawn(|| discard(way, &engine, &memory, run(0, 16)));
                gate.pass(1);
                gate.open();
                discarding.join().unwrap();
                assert_zero(&memory, run(0, 16));
            });
            engine.wait().unwrap();
            assert_zero(&memory, run(0, 16));
            for page in 16..64 {
                assert!(memory.load(BlockId(0), PageIndex(page)) == oracle.run(run(page, 1)));
            }
        }
    }
}

/// A fault and a discard of the same page are read together: the discard is applied first, so that nothing is fetched for
/// the fault.
#[test]
fn a_discard_read_together_with_a_fault_comes_first() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let gate = Gate::closed();
    let at_gate = gate.clone();
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .background(Background::off())
        .pauses(move |point| {
            if point == PausePoint::FaultRead {
                at_gate.enter();
            }
        })
        .start()
        .unwrap();
    std::thread::scope(|scope| {
        // The handler is held at a fault on page 9 while a discard and a fault of page 3 queue up.
        let other = scope.spawn(|| memory.load(BlockId(0), PageIndex(9)));
        gate.wait_for(1);
        let discarding = Thread::spawn(scope, || give_back(&memory, run(3, 1)));
        discarding.wait_for_discard();
        let touching = Thread::spawn(scope, || memory.load(BlockId(0), PageIndex(3)));
        touching.wait_for_fault();
        gate.open();
        assert!(touching.join().iter().all(|&byte| byte == 0));
        discarding.join();
        assert!(other.join().unwrap() == oracle.run(run(9, 1)));
    });
    let stats = counted(&engine, |stats| stats.demand_pages > 0);
    assert_eq!((stats.removed_pages, stats.demand_pages), (1, 1), "{stats:?}");
    assert!(stats.retries > 0, "page 9 was tried while the discard was unread: {stats:?}");
}

/// A fault waits for a source that is late, and its page is given back meanwhile: nobody would wake it when the content
/// comes that is not taken any more.
#[test]
fn a_fault_that_waits_for_a_page_that_is_given_back_gets_zeros() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        for way in [Way::Kernel, Way::Engine, Way::EngineAnnounced] {
            let oracle = full(64);
            let memory = Memory::new(kind, oracle.layout());
            let gate = Gate::closed();
            let late = LateSource::new(Arc::clone(&oracle), 1).with_unasked(false).with_gate(gate.clone());
            let engine =
                memory.engine(Arc::new(late)).background(Background::off()).discards(way.discards()).start().unwrap();
            std::thread::scope(|scope| {
                let touching = Thread::spawn(scope, || memory.read(BlockId(0), PageIndex(7)));
                gate.wait_for(1);
                discard(way, &engine, &memory, run(7, 1));
                gate.open();
                let got = touching.heard(|| engine.cancel());
                assert!(got.unwrap().iter().all(|&byte| byte == 0), "{kind:?} {way:?}");
            });
            assert!(engine.outcome().is_none());
        }
    }
}

/// A fault is left to the loader, which has claimed its page; then the page is given back, and the loader may not install
/// it any more.
#[test]
fn a_fault_that_was_left_to_an_install_that_fails_gets_zeros() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let oracle = full(64);
        let memory = Memory::new(kind, oracle.layout());
        let (read, claimed) = (Gate::closed(), Gate::closed());
        let gates = (read.clone(), claimed.clone());
        let engine = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .background(Background::default().paused())
            .pauses(move |point| match point {
                PausePoint::FaultRead => gates.0.enter(),
                PausePoint::Claimed if std::thread::current().name() == Some("uffd-load-0") => gates.1.enter(),
                _ => {}
            })
            .start()
            .unwrap();
        std::thread::scope(|scope| {
            let touching = Thread::spawn(scope, || memory.read(BlockId(0), PageIndex(3)));
            read.wait_for(1);
            engine.resume_background();
            claimed.wait_for(1);
            let discarding = Thread::spawn(scope, || give_back(&memory, run(3, 1)));
            discarding.wait_for_discard();
            read.open();
            claimed.open();
            let got = touching.heard(|| engine.cancel());
            discarding.join();
            assert!(got.unwrap().iter().all(|&byte| byte == 0), "{kind:?}");
        });
        engine.wait().unwrap();
    }
}

/// A page is claimed between the moment at which a discard is announced and the one at which it is marked: the discard
/// waits for that install, and its page is not installed behind it.
#[test]
fn an_announced_discard_waits_for_an_install_that_has_just_begun() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let (announced, claimed) = (Gate::closed(), Gate::closed());
    let gates = (announced.clone(), claimed.clone());
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .background(Background::default().paused())
        .discards(Discards::Announced)
        .pauses(move |point| match point {
            PausePoint::Discarding => gates.0.enter(),
            PausePoint::Claimed => gates.1.enter(),
            _ => {}
        })
        .start()
        .unwrap();
    std::thread::scope(|scope| {
        let discarding = scope.spawn(|| engine.discard(run(3, 1)).unwrap());
        announced.wait_for(1);
        engine.resume_background();
        claimed.wait_for(1);
        announced.open();
        // Something that must not happen can only be waited for by the clock; what is right does not depend on it.
        let until = Instant::now() + Duration::from_millis(100);
        while Instant::now() < until && !discarding.is_finished() {
            std::thread::yield_now();
        }
        let early = discarding.is_finished();
        claimed.open();
        discarding.join().unwrap();
        assert!(!early, "the page was given back while it was being installed");
    });
    assert_zero(&memory, run(3, 1));
    engine.wait().unwrap();
    assert_zero(&memory, run(3, 1));
}

/// A source that pushes while it is being started, when no handler reads events yet, and a discard at that moment.
#[test]
fn a_discard_while_the_source_is_being_started() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let claimed = Gate::closed();
    let at_gate = claimed.clone();
    let source = Box::new(Scripted::new(Arc::clone(&oracle)).pushing_at_start());
    std::thread::scope(|scope| {
        let starting = scope.spawn(|| {
            let builder = memory.engine(source).background(Background::off());
            let builder = builder.pauses(move |point| {
                if point == PausePoint::Claimed {
                    at_gate.enter();
                }
            });
            builder.start().unwrap()
        });
        claimed.wait_for(1);
        let discarding = Thread::spawn(scope, || give_back(&memory, run(3, 1)));
        discarding.wait_for_discard();
        claimed.open();
        let engine = starting.join().unwrap();
        discarding.join();
        assert_zero(&memory, run(3, 1));
        drop(engine);
    });
    for page in (0..64).filter(|&page| page != 3) {
        assert!(memory.load(BlockId(0), PageIndex(page)) == oracle.run(run(page, 1)));
    }
}

/// Pages keep being given back and touched again while handlers, loaders and the kernel are all at them.
#[test]
fn a_storm_of_discards() {
    testkit::require!(Userfaultfd);
    let oracle = oracle(3, 4096);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .handlers(Handlers::threads(2))
        .background(Background::default().paused().with_threads(2).with_piece(PageCount(16)))
        .start()
        .unwrap();
    // One while the engine is there for certain: all might be loaded before the others begin.
    give_back(&memory, run(0, 16));
    assert_zero(&memory, run(0, 16));
    engine.resume_background();
    std::thread::scope(|scope| {
        for (half, seed) in seeds(2) {
            let memory = &memory;
            scope.spawn(move || {
                let mut random = StdRng::seed_from_u64(seed);
                for _ in 0..400 {
                    let pages = random.random_range(1..=32);
                    let range = run(half * 2048 + random.random_range(0..=2048 - pages), pages);
                    give_back(memory, range);
                    assert_zero(memory, range);
                }
            });
        }
    });
    engine.wait().unwrap();
    assert!(engine.stats().removed_pages >= 16, "{:?}", engine.stats());
}

#[test]
fn what_can_not_be_discarded_is_refused() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = testkit::hugepages::Overcommit::reserve(4).unwrap();
    let oracle = oracle(4, 1024);
    let memory = Memory::new(Kind::HugetlbPrivate, oracle.layout());
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let engine = memory.engine(source).background(Background::off()).start().unwrap();
    assert!(matches!(engine.discard(run(0, 1)), Err(DiscardError::Outside(_))), "half a huge page");
    assert!(matches!(engine.discard(run(512, 1024)), Err(DiscardError::Outside(_))));
    engine.discard(run(512, 512)).unwrap();
    assert_zero(&memory, run(512, 512));
    assert!(memory.load(BlockId(0), PageIndex(5)) == oracle.run(run(5, 1)));
    assert!(memory.resident() <= ByteLen(4 << 20));
}
