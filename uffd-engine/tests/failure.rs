//! Whatever goes wrong: never wrong bytes, never a hang. What is missing is poisoned, and the VMM is told.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use common::refused::right_or_refused;
use common::scripted::{Scripted, full};
use common::{Kind, Memory};
use page_source::{PageSource, Reply, SourceErrorKind};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;
use testkit::faults::{Altered, Fault, FaultySource};
use testkit::gate::Gate;
use testkit::hugepages::Overcommit;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;
use uffd_engine::{Background, Discards, Engine, EngineError, Event, FailurePolicy, Handlers, Wait};

fn oracle(seed: u64, pages: u64, stored: u8) -> Arc<Oracle> {
    let block = RamBlock::new("ram", PageCount(pages).to_bytes(), PageSize::SMALL).unwrap();
    Arc::new(Oracle::random(seed, Layout::new(vec![block]).unwrap(), stored))
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    kind: Kind,
    at: u64,
    fault: u8,
    late: bool,
    background: bool,
    wait: Wait,
    discards: Discards,
}

fn cases() -> impl Strategy<Value = Case> {
    const KINDS: [Kind; 5] =
        [Kind::Anonymous, Kind::MemfdShared, Kind::MemfdPrivate, Kind::HugetlbPrivate, Kind::HugetlbAlias];
    let wait = prop_oneof![3 => Just(Wait::Block), 1 => Just(Wait::Spin)];
    let discards = prop_oneof![Just(Discards::Events), Just(Discards::Announced)];
    (any::<u64>(), prop::sample::select(&KINDS[..]), 0..40u64, 0..5u8, any::<bool>(), any::<bool>(), wait, discards)
        .prop_map(|(seed, kind, at, fault, late, background, wait, discards)| Case {
            seed,
            kind,
            at,
            fault,
            late,
            background,
            wait,
            discards,
        })
}

fn fault(number: u8) -> Fault {
    match number {
        0 => Fault::Error,
        1 => Fault::Short,
        2 => Fault::Panic,
        3 => Fault::Silence,
        _ => Fault::Broken,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: testkit::seed::cases(40), max_shrink_iters: 8, ..ProptestConfig::default() })]

    #[test]
    fn a_source_that_goes_wrong_gives_errors_and_never_wrong_bytes(case in cases()) {
        testkit::require!(Userfaultfd, Hugepages; Ok(()));
        let _pages = Overcommit::reserve(4).unwrap();
        let oracle = oracle(case.seed, 1024, 120);
        let memory = Memory::new(case.kind, oracle.layout());
        let inner: Arc<dyn PageSource> = match case.late {
            true => Arc::new(LateSource::new(Arc::clone(&oracle), case.seed)),
            false => Arc::new(MemorySource::new(Arc::clone(&oracle)).knowing_nothing()),
        };
        let source = FaultySource::new(inner, case.at, fault(case.fault));
        let background = Background::default().with_piece(PageCount(16)).with_window(PageCount(64));
        let engine = memory
            .engine(Arc::new(source))
            .handlers(Handlers::threads(1).waiting(case.wait))
            .discards(case.discards)
            .background(if case.background { background } else { Background::off() })
            .start()
            .unwrap();
        let refused = right_or_refused(&memory, &oracle);
        drop(engine);
        let after = right_or_refused(&memory, &oracle);
        prop_assert!(after >= refused, "poison stays");
    }
}

#[test]
fn the_vmm_is_told_after_everything_missing_is_poisoned() {
    testkit::require!(Userfaultfd);
    let oracle = oracle(1, 2048, 255);
    let memory = Arc::new(Memory::new(Kind::Anonymous, oracle.layout()));
    let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 3, Fault::Error);
    let (tell, heard) = mpsc::channel();
    let engine = memory
        .engine(Arc::new(source))
        .background(Background::default().with_piece(PageCount(16)))
        .observer(move |event| tell.send(event.clone()).unwrap())
        .start()
        .unwrap();
    let error = engine.wait().unwrap_err();
    assert!(matches!(&error, EngineError::Source { run, .. } if run.pages == PageCount(16)), "{error}");
    assert!(error.to_string().contains("pages 48..64 of RAM block \"ram\""), "{error}");
    assert!(heard.iter().any(|event| matches!(event, Event::Failed(EngineError::Source { .. }))));
    // Three pieces of 16 came; the failed piece and the rest did not.
    assert_eq!(right_or_refused(&memory, &oracle), 2048 - 48);
    assert_eq!(engine.stats().poisoned_pages, 2048 - 48);
}

#[test]
fn with_a_lenient_policy_only_the_failed_pages_are_lost() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let oracle = oracle(2, 2048, 255);
        let memory = Memory::new(kind, oracle.layout());
        let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 3, Fault::Short);
        let (tell, heard) = mpsc::channel();
        let engine = memory
            .engine(Arc::new(source))
            .on_failure(FailurePolicy::PoisonFailed)
            .background(Background::default().with_piece(PageCount(16)))
            .observer(move |event| tell.send(event.clone()).unwrap())
            .start()
            .unwrap();
        engine.wait().unwrap();
        assert!(heard.recv().is_ok_and(|event| matches!(event, Event::PagesFailed(EngineError::Source { .. }))));
        assert_eq!(right_or_refused(&memory, &oracle), 8);
        drop(engine);
        assert_eq!(right_or_refused(&memory, &oracle), 8);
    }
}

#[test]
fn a_slow_source_holds_up_nothing_but_its_own_pages() {
    testkit::require!(Userfaultfd);
    let oracle = full(256);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let peer = Scripted::new(Arc::clone(&oracle));
    let engine = memory.engine(peer.peer()).background(Background::off()).start().unwrap();
    let page = |number| PageRun::single(BlockId(0), PageIndex(number));
    let wait_for = |run: PageRun| {
        while !peer.asked().contains(&run) {
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let late = scope.spawn(|| memory.read(BlockId(0), PageIndex(7)));
        wait_for(page(7));
        // One handler, which has page 7 outstanding: others come and go, and pages are given back.
        for number in 8..40 {
            let run = page(number);
            let reader = scope.spawn({
                let memory = &memory;
                move || memory.read(BlockId(0), PageIndex(number))
            });
            wait_for(run);
            assert!(matches!(peer.push(run), Reply::Taken));
            assert!(reader.join().unwrap().unwrap() == oracle.run(run));
        }
        engine.discard(page(8)).unwrap();
        assert_eq!(memory.read(BlockId(0), PageIndex(8)).unwrap(), vec![0; common::PAGE]);
        assert!(!late.is_finished());
        assert!(matches!(peer.push(page(7)), Reply::Taken));
        assert!(late.join().unwrap().unwrap() == oracle.run(page(7)));
    });
}

#[test]
fn dropping_an_engine_with_a_waiting_fault_refuses_it() {
    testkit::require!(Userfaultfd);
    for cancel in [false, true] {
        let oracle = oracle(6, 256, 255);
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let gate = Gate::closed();
        let late = LateSource::new(Arc::clone(&oracle), 1).with_gate(gate.clone());
        let engine = memory.engine(Arc::new(late)).background(Background::off()).start().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| memory.read(BlockId(0), PageIndex(7)));
            gate.wait_for(1);
            if cancel {
                engine.cancel();
                assert!(matches!(engine.wait(), Err(EngineError::Cancelled)));
            }
            drop(engine);
            assert_eq!(waiting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EFAULT));
        });
        assert_eq!(right_or_refused(&memory, &oracle), 256);
    }
}

#[test]
fn an_engine_may_be_dropped_at_any_moment() {
    testkit::require!(Userfaultfd);
    for (number, seed) in seeds(60) {
        let oracle = oracle(seed, 2048, 200);
        let memory = Memory::new(common::SMALL_KINDS[(number % 3) as usize], oracle.layout());
        let background = Background::default().with_threads(1 + (number % 2) as usize).with_piece(PageCount(8));
        let handlers = Handlers::threads(1 + (number / 2 % 2) as usize);
        let source: Arc<dyn PageSource> = match number % 3 {
            0 => Arc::new(LateSource::new(Arc::clone(&oracle), seed).with_unasked(true)),
            _ => Arc::new(MemorySource::new(Arc::clone(&oracle))),
        };
        let engine = memory.engine(source).background(background).handlers(handlers).start().unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        for _ in 0..random.random_range(0..=number) {
            memory.load(BlockId(0), PageIndex(random.random_range(0..2048)));
        }
        drop(engine);
        right_or_refused(&memory, &oracle);
    }
}

#[test]
fn two_engines_are_strangers() {
    testkit::require!(Userfaultfd);
    let oracles = [oracle(10, 512, 255), oracle(11, 512, 255)];
    let memories = [0, 1].map(|i: usize| Memory::new(Kind::Anonymous, oracles[i].layout()));
    let engine = |i: usize| -> Engine {
        let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracles[i]))), 0, Fault::Error);
        let good = MemorySource::new(Arc::clone(&oracles[i]));
        let source: Arc<dyn PageSource> = if i == 0 { Arc::new(source) } else { Arc::new(good) };
        memories[i].engine(source).start().unwrap()
    };
    let (bad, good) = (engine(0), engine(1));
    assert!(bad.wait().is_err());
    good.wait().unwrap();
    memories[1].assert_equals(&oracles[1]);
}

#[test]
fn nothing_is_left_open() {
    testkit::require!(Userfaultfd);
    let oracle = oracle(12, 64, 255);
    let done = AtomicBool::new(false);
    let tasks = || std::fs::read_dir("/proc/self/task").unwrap().count();
    // Other tests of this process come and go: what counts is that a thousand engines leave no thousand of anything.
    let (fds, threads) = (common::fd_count(), tasks());
    for _ in 0..200 {
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let engine = memory.engine(Arc::new(MemorySource::new(Arc::clone(&oracle)))).start().unwrap();
        done.store(engine.wait().is_ok(), Ordering::Relaxed);
    }
    assert!(common::fd_count() < fds + 150 && tasks() < threads + 150);
    assert!(done.into_inner());
}

#[test]
fn a_source_that_was_altered_is_never_complete() {
    testkit::require!(Userfaultfd);
    let oracle = oracle(14, 512, 255);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = memory.engine(Arc::new(Altered::new(MemorySource::new(Arc::clone(&oracle))))).start().unwrap();
    let error = engine.wait().unwrap_err();
    assert!(matches!(&error, EngineError::Broken(why) if why.kind() == SourceErrorKind::Changed), "{error}");
}
