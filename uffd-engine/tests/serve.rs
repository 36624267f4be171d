//! Memory served from a source equals the source, whatever the memory is made of and in whatever order it is touched.

mod common;

use std::sync::Arc;

use common::{HUGE_KINDS, Kind, Memory, SMALL_KINDS, counted};
use page_source::{Answer, Feed, PageSink, PageSource, Pages, SourceError, Span, Urgency};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use parking_lot::Mutex;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use testkit::hugepages::Overcommit;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Discards, Event, Handlers, Wait};

fn one_block(pages: u64) -> Layout {
    Layout::new(vec![RamBlock::new("ram", PageCount(pages).to_bytes(), PageSize::SMALL).unwrap()]).unwrap()
}

/// Touches every page in a random order from `threads` threads, each with every page, comparing it.
fn touch_all(memory: &Memory, oracle: &Oracle, seed: u64, threads: u64) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut pages: Vec<PageRun> = memory
                    .layout
                    .runs()
                    .flat_map(|run| run.iter().map(move |page| PageRun::single(run.block, page)))
                    .collect();
                pages.shuffle(&mut StdRng::seed_from_u64(seed + thread));
                for page in pages {
                    assert!(memory.load(page.block, page.first) == oracle.run(page), "{page} differs");
                }
            });
        }
    });
}

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    kind: Kind,
    source: u8,
    stored: u8,
    handlers: usize,
    wait: Wait,
    discards: Discards,
    background: usize,
    around: u64,
    touchers: u64,
}

fn source(case: &Case, oracle: &Arc<Oracle>) -> Arc<dyn PageSource> {
    let oracle = Arc::clone(oracle);
    match case.source {
        0 => Arc::new(MemorySource::new(oracle)),
        1 => Arc::new(MemorySource::new(oracle).knowing_nothing()),
        2 => Arc::new(LateSource::new(oracle, case.seed).with_threads(2)),
        _ => Arc::new(LateSource::new(oracle, case.seed).with_unasked(true)),
    }
}

fn run(case: &Case, layout: Layout) {
    let oracle = Arc::new(Oracle::random(case.seed, layout, case.stored));
    let memory = Memory::new(case.kind, oracle.layout());
    let background = Background::default().with_piece(PageCount(64)).with_window(PageCount(256));
    let engine = memory
        .engine(source(case, &oracle))
        .handlers(Handlers::threads(case.handlers).waiting(case.wait))
        .background(if case.background == 0 { Background::off() } else { background.with_threads(case.background) })
        .discards(case.discards)
        .pages_per_fault(PageCount(case.around))
        .start()
        .unwrap();
    touch_all(&memory, &oracle, case.seed, case.touchers);
    if case.background > 0 {
        engine.wait().unwrap();
        let stored = oracle.layout().runs().flat_map(|run| oracle.kinds(run).collect::<Vec<_>>());
        let stored: u64 = stored.filter(|(_, zero)| !zero).map(|(run, _)| run.pages.0).sum();
        if case.kind != Kind::MemfdPrivate && PageSize::SMALL == kind_granule(case.kind) {
            let stats = counted(&engine, |stats| stats.demand_pages + stats.background_pages == stored);
            assert_eq!(stats.demand_pages + stats.background_pages, stored, "{stats:?}");
        }
    }
    drop(engine);
    memory.assert_equals(&oracle);
}

fn kind_granule(kind: Kind) -> PageSize {
    if HUGE_KINDS.contains(&kind) { PageSize::HUGE } else { PageSize::SMALL }
}

fn cases(kinds: &'static [Kind]) -> impl Strategy<Value = Case> {
    let wait = prop_oneof![4 => Just(Wait::Block), 1 => Just(Wait::Spin)];
    let discards = prop_oneof![Just(Discards::Events), Just(Discards::Announced)];
    let choices = (any::<u64>(), prop::sample::select(kinds), 0..4u8, any::<u8>());
    let threads = (1..3usize, wait, discards, 1..3usize, prop::sample::select(&[1u64, 4, 16][..]), 0..3u64);
    (choices, threads).prop_map(
        |((seed, kind, source, stored), (handlers, wait, discards, background, around, touchers))| Case {
            seed,
            kind,
            source,
            stored,
            handlers,
            wait,
            discards,
            background,
            around,
            touchers,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: testkit::seed::cases(48), max_shrink_iters: 32, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_of_small_pages_is_the_sources(case in cases(&SMALL_KINDS)) {
        testkit::require!(Userfaultfd; Ok(()));
        run(&case, Oracle::random_layout(case.seed, 1500));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: testkit::seed::cases(16), max_shrink_iters: 8, ..ProptestConfig::default() })]

    #[test]
    fn every_byte_of_huge_pages_is_the_sources(case in cases(&HUGE_KINDS)) {
        testkit::require!(Userfaultfd, Hugepages; Ok(()));
        let _pages = Overcommit::reserve(8).unwrap();
        let mut random = StdRng::seed_from_u64(case.seed);
        run(&case, one_block(512 * random.random_range(1..=4)));
    }
}

#[test]
fn without_background_only_what_is_touched_comes() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(7, one_block(4096), 200));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let engine = memory.engine(source).background(Background::off()).start().unwrap();
    let run = oracle.layout().runs().next().unwrap();
    for page in run.iter().step_by(64) {
        assert!(memory.load(run.block, page) == oracle.run(PageRun::single(run.block, page)));
    }
    let stats = engine.stats();
    assert!(engine.outcome().is_none());
    assert!(stats.demand_faults <= 64 && stats.background_pages == 0, "{stats:?}");
    assert!(memory.resident() <= ByteLen((64 * 64) << 10), "{:?}", memory.resident());
}

#[test]
fn zero_pages_are_never_installed_in_the_background() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::zero(one_block(1 << 18)));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = memory.engine(Arc::new(MemorySource::new(Arc::clone(&oracle)))).start().unwrap();
    let stats = engine.wait().unwrap().stats;
    assert_eq!((stats.zero_pages_skipped, stats.zero_pages_installed, stats.bytes), (1 << 18, 0, ByteLen(0)));
    assert_eq!(memory.resident(), ByteLen(0));
    assert!(memory.load(page_units::BlockId(0), PageIndex(77)).iter().all(|&byte| byte == 0));
}

#[test]
fn the_observer_hears_of_the_first_fault_and_of_completion() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(1, one_block(512), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let (tell, heard) = std::sync::mpsc::channel();
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .background(Background::default().paused())
        .observer(move |event| tell.send(event.clone()).unwrap())
        .start()
        .unwrap();
    memory.load(page_units::BlockId(0), PageIndex(9));
    assert!(matches!(heard.recv().unwrap(), Event::FirstFault { .. }));
    assert!(engine.outcome().is_none());
    engine.resume_background();
    assert!(matches!(heard.recv().unwrap(), Event::RegionComplete { run } if run.pages == PageCount(512)));
    assert!(matches!(heard.recv().unwrap(), Event::Complete { .. }));
    let done = engine.wait().unwrap();
    let stats = counted(&engine, |stats| stats.latency.count == stats.demand_faults);
    assert!(stats.demand_faults > 0 && stats.latency.count == stats.demand_faults, "{stats:?}");
    assert_eq!(done.stats.time_to_complete, Some(done.after));
}

#[test]
fn a_rate_limits_the_background_and_not_the_demand() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(3, one_block(2048), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let rate = Background::default().with_rate(ByteLen(1)).with_piece(PageCount(16));
    let engine = memory.engine(Arc::new(MemorySource::new(Arc::clone(&oracle)))).background(rate).start().unwrap();
    touch_all(&memory, &oracle, 5, 1);
    assert!(engine.stats().background_pages <= 16 + 16, "one piece, then a debt of days: {:?}", engine.stats());
    drop(engine);
    memory.assert_equals(&oracle);
}

#[test]
fn the_background_follows_the_faults() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(4, one_block(8192), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let order = Arc::new(Mutex::new(Vec::new()));
    let source = Recording { inner: MemorySource::new(Arc::clone(&oracle)), order: Arc::clone(&order) };
    let background = Background::default().paused().with_piece(PageCount(64));
    let engine = memory.engine(Arc::new(source)).background(background).start().unwrap();
    memory.load(page_units::BlockId(0), PageIndex(5000));
    engine.resume_background();
    engine.wait().unwrap();
    let order = order.lock();
    assert_eq!(order[0], (PageIndex(5000), Urgency::Demand));
    let start = order.iter().position(|&(page, _)| page < PageIndex(5000)).unwrap();
    assert!(start > 4, "it goes on from there before it begins at the start: {order:?}");
    assert!(order[1..start].iter().all(|&(page, _)| (5001..5512).contains(&page.0)), "{order:?}");
    memory.assert_equals(&oracle);
}

/// The pages after a fault are more than the huge page in which it was.
#[test]
fn the_background_follows_the_faults_in_huge_pages() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    let oracle = Arc::new(Oracle::random(4, one_block(16 * 512), 255));
    let memory = Memory::new(Kind::HugetlbPrivate, oracle.layout());
    let order = Arc::new(Mutex::new(Vec::new()));
    let source = Recording { inner: MemorySource::new(Arc::clone(&oracle)), order: Arc::clone(&order) };
    let engine = memory.engine(Arc::new(source)).background(Background::default().paused()).start().unwrap();
    memory.load(page_units::BlockId(0), PageIndex(5 * 512 + 100));
    engine.resume_background();
    engine.wait().unwrap();
    let order: Vec<u64> = order.lock().iter().map(|&(page, _)| page.0 / 512).collect();
    let right: Vec<u64> = (5..13).chain(0..5).chain(13..16).collect();
    assert_eq!(order, right);
    memory.assert_equals(&oracle);
}

/// Notes what is asked for.
#[derive(Debug)]
struct Recording {
    inner: MemorySource,
    order: Arc<Mutex<Vec<(PageIndex, Urgency)>>>,
}

#[derive(Debug)]
struct RecordingFeed(Box<dyn Feed>, Arc<Mutex<Vec<(PageIndex, Urgency)>>>);

impl Pages for Recording {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        self.inner.content(run)
    }
}

impl PageSource for Recording {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(RecordingFeed(self.inner.start(sink)?, Arc::clone(&self.order))))
    }
}

impl Feed for RecordingFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        self.1.lock().push((run.first, urgency));
        self.0.request(run, urgency)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        self.0.finish()
    }
}

/// It may touch the memory, and nothing has been loaded that it has not touched.
#[test]
fn it_is_told_when_faults_are_served() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(9, one_block(2048), 255));
    let memory = Arc::new(Memory::new(Kind::Anonymous, oracle.layout()));
    let order = Arc::new(Mutex::new(Vec::new()));
    let source = Recording { inner: MemorySource::new(Arc::clone(&oracle)), order: Arc::clone(&order) };
    let told = Arc::new(Mutex::new(Vec::new()));
    let (tell, touched, so_far) = (Arc::clone(&told), Arc::clone(&memory), Arc::clone(&order));
    let expected = Arc::clone(&oracle);
    let serving = move || {
        let page = PageRun::single(BlockId(0), PageIndex(1000));
        let right = touched.load(page.block, page.first) == expected.run(page);
        tell.lock().push((std::thread::current().id(), right, so_far.lock().clone()));
    };
    let engine = memory.engine(Arc::new(source)).serving(serving).start().unwrap();
    engine.wait().unwrap();
    let here = std::thread::current().id();
    assert_eq!(*told.lock(), [(here, true, vec![(PageIndex(1000), Urgency::Demand)])]);
    memory.assert_equals(&oracle);
}

#[test]
fn arrangements_of_handlers_are_measured_and_work() {
    testkit::require!(Userfaultfd, TwoCpus);
    let measured = Handlers::measure(&[0], Some(1)).unwrap();
    assert_eq!(measured.len(), 4);
    assert!(measured.windows(2).all(|pair| pair[0].median <= pair[1].median), "{measured:?}");
    let oracle = Arc::new(Oracle::random(8, one_block(512), 200));
    for one in measured {
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
        let engine = memory.engine(source).handlers(one.handlers).discards(Discards::Announced).start().unwrap();
        touch_all(&memory, &oracle, 1, 1);
        engine.wait().unwrap();
    }
}

/// All of it is there before (`mlockall` does that to fresh memory): the guest would get zeros. A page that somebody has
/// written before stays.
#[test]
fn memory_that_is_there_already_is_refused() {
    testkit::require!(Userfaultfd);
    let _room = Overcommit::reserve(8).unwrap();
    let oracle = common::scripted::full(1024);
    for kind in [Kind::Anonymous, Kind::HugetlbPrivate] {
        let memory = Memory::new(kind, oracle.layout());
        let touch = |page| memory.store(BlockId(0), PageIndex(page), &[9; common::PAGE]);
        let start = || memory.engine(Arc::new(MemorySource::new(Arc::clone(&oracle)))).start();
        if kind == Kind::Anonymous {
            // (It may bring a huge page with it.)
            touch(0);
            start().unwrap().wait().unwrap();
            assert_eq!(memory.load(BlockId(0), PageIndex(0)), [9; common::PAGE]);
            let one = PageRun::single(BlockId(0), PageIndex(1023));
            assert!(memory.load(BlockId(0), one.first) == oracle.run(one));
        }
        (0..1024).for_each(touch);
        let error = start().unwrap_err().to_string();
        assert!(error.contains("there already"), "{error}");
    }
}

#[test]
fn cores_that_do_not_exist_are_refused() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(5, one_block(8), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let allowed = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    for core in [1000, 100_000] {
        for (handlers, background) in [
            (Handlers::on_cores([core]), Background::default()),
            (Handlers::default(), Background::default().on_cores([core])),
        ] {
            let builder = memory.engine(Arc::new(MemorySource::new(Arc::clone(&oracle))));
            let started = builder.handlers(handlers).background(background).start();
            assert!(matches!(started, Err(uffd_engine::StartError::Core(refused)) if refused == core), "{started:?}");
        }
        assert!(Handlers::measure(&[core], None).is_err() && Handlers::measure(&[], Some(core)).is_err());
    }
    assert_eq!(nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap(), allowed);
}
