//! The background loader is held: by who asks it to pause, and by a source that hangs.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::collector::layout;
use common::refused::right_or_refused;
use common::{Kind, Memory, PAGE, counted};
use page_files::FlatFile;
use page_source::{Answer, Feed, PageSink, PageSource, Pages, SourceError, Span, Urgency};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun};
use testkit::gate::Gate;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, EngineError, FreezeOptions};

/// Requests of the background come to a gate before they are answered.
#[derive(Debug)]
struct Held {
    inner: Arc<dyn PageSource>,
    gate: Gate,
    /// Passed by the supervisor each time it looks whether something is missing.
    checked: Gate,
}

#[derive(Debug)]
struct HeldFeed(Box<dyn Feed>, Gate);

impl Held {
    fn new(inner: impl PageSource + 'static) -> (Arc<Held>, Gate) {
        let gate = Gate::closed();
        (Arc::new(Held { inner: Arc::new(inner), gate: gate.clone(), checked: Gate::open_at_first() }), gate)
    }
}

impl Pages for Held {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        if std::thread::current().name() == Some("uffd-supervisor") {
            self.checked.enter();
        }
        self.inner.content(run)
    }
}

impl PageSource for Held {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(HeldFeed(self.inner.start(sink)?, self.gate.clone())))
    }
}

impl Feed for HeldFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        if urgency == Urgency::Background {
            self.1.enter();
        }
        self.0.request(run, urgency)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        self.0.finish()
    }
}

#[test]
fn a_pause_stops_the_background_and_not_the_demand() {
    testkit::require!(Userfaultfd);
    const PAGES: u64 = 8192;
    const PIECE: u64 = 64;
    let oracle = Arc::new(Oracle::random(11, layout(&[PAGES]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let (source, gate) = Held::new(MemorySource::new(Arc::clone(&oracle)));
    let background = Background::default().with_piece(PageCount(PIECE));
    let engine = memory.engine(source).background(background).start().unwrap();
    gate.wait_for(1);
    engine.pause_background();
    gate.open();
    let half = PAGES / 2;
    for page in (0..half).map(PageIndex) {
        assert!(memory.load(BlockId(0), page) == oracle.run(PageRun::single(BlockId(0), page)), "page {page}");
    }
    let stats = engine.stats();
    assert!(stats.background_pages <= PIECE, "what was under way, and no more: {stats:?}");
    assert!(stats.demand_faults >= half - PIECE && engine.outcome().is_none(), "{stats:?}");
    engine.resume_background();
    engine.wait().unwrap();
    let stats = counted(&engine, |stats| stats.background_pages >= half);
    assert!(stats.background_pages >= half, "{stats:?}");
    memory.assert_equals(&oracle);
}

/// A file with a hole after each page, of which nothing is known before it is asked: between any two pieces the background
/// may be paused or held back.
#[test]
fn a_file_full_of_holes_is_loaded_turn_by_turn() {
    testkit::require!(Userfaultfd);
    const PAGES: u64 = 2048;
    let page = |number: u64| vec![u8::try_from(number % 2).unwrap(); PAGE];
    let oracle = Oracle::new([("ram", (0..PAGES).flat_map(page).collect())]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("flat");
    let blocks = oracle.write_flat(&path).unwrap();
    let background = Background::default().with_piece(PageCount(4));
    let ways = [background.clone(), background.with_rate(ByteLen(1))];
    for (background, pauses) in ways.into_iter().zip([true, false]) {
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let (source, gate) = Held::new(FlatFile::open(&path, blocks.clone()).unwrap());
        let engine = memory.engine(source).background(background).start().unwrap();
        gate.wait_for(1);
        if pauses {
            engine.pause_background();
        }
        gate.open();
        // The first request was under way: of four pages, two of which are holes.
        for number in (3..PAGES).map(PageIndex) {
            memory.load(BlockId(0), number);
        }
        let stats = engine.stats();
        assert!(stats.background_pages <= 2 && engine.outcome().is_none(), "{stats:?}");
        engine.resume_background();
        if pauses {
            engine.wait().unwrap();
            memory.assert_equals(&oracle);
        }
    }
}

/// The supervisor begins the load again while a loader stands in its source, and is then to end the engine.
#[test]
fn the_end_does_not_wait_for_a_source_that_hangs() {
    testkit::require!(Userfaultfd);
    let oracle = Arc::new(Oracle::random(12, layout(&[256]), 255));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let (source, gate) = Held::new(MemorySource::new(Arc::clone(&oracle)).knowing_nothing());
    let engine = memory.engine(Arc::<Held>::clone(&source)).start().unwrap();
    gate.wait_for(1);
    let freezer = engine.freezer(memory.regions(), oracle.layout().clone(), &FreezeOptions::default()).unwrap();
    drop(freezer.arm().unwrap());
    // The end of the freeze has it look what is missing: from then on it is on its way to begin again.
    source.checked.wait_for_passed(1);
    std::thread::scope(|scope| {
        scope.spawn(|| engine.cancel());
        let ended = engine.wait_for(Duration::from_secs(20));
        // Poisoned, although the source has not answered.
        let refused = if ended.is_some() { right_or_refused(&memory, &oracle) } else { 0 };
        gate.open();
        assert!(matches!(ended, Some(Err(EngineError::Cancelled))), "{ended:?}");
        assert_eq!(refused, 256);
    });
}
