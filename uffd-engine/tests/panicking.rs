//! A source that panics when an engine's thread asks it something: the engine fails closed, and every waiter is answered.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::refused::right_or_refused_or_zero;
use common::{Kind, Memory, PAGE};
use page_source::{Answer, Feed, PageSink, PageSource, Pages, SourceError, Span, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Engine, EngineError};

/// What a source is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Content,
    Finish,
    Start,
}

/// Panics whenever a thread of that name asks that, after it has asked a number of times.
#[derive(Clone, Debug)]
struct Panicking {
    inner: MemorySource,
    question: Question,
    thread: &'static str,
    after: u64,
    asked: Arc<AtomicU64>,
}

impl Panicking {
    fn hear(&self, question: Question) {
        if question == self.question && std::thread::current().name() == Some(self.thread) {
            assert!(self.asked.fetch_add(1, Ordering::Relaxed) < self.after, "injected");
        }
    }
}

impl Pages for Panicking {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        self.hear(Question::Content);
        self.inner.content(run)
    }
}

impl PageSource for Panicking {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        self.hear(Question::Start);
        Ok(Box::new(PanickingFeed(self.inner.start(sink)?, self.clone())))
    }
}

#[derive(Debug)]
struct PanickingFeed(Box<dyn Feed>, Panicking);

impl Feed for PanickingFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        self.0.request(run, urgency)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        self.1.hear(Question::Finish);
        self.0.finish()
    }
}

const PAGES: u64 = 64;
/// The first half has content.
const ZERO: PageIndex = PageIndex(PAGES / 2 + 4);
const STORED: PageIndex = PageIndex(8);
const GIVEN_BACK: PageIndex = PageIndex(4);

fn oracle() -> Arc<Oracle> {
    let page = |number: u64| vec![u8::from(number < PAGES / 2); PAGE];
    Arc::new(Oracle::new([("ram", (0..PAGES).flat_map(page).collect())]).unwrap())
}

/// Lets the source panic, sees what comes of it, and answers how many pages are unavailable.
fn refused(
    question: Question,
    thread: &'static str,
    after: u64,
    background: Background,
    does: impl Fn(&Memory, &Engine),
) -> u64 {
    let oracle = oracle();
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let inner = MemorySource::new(Arc::clone(&oracle));
    let source = Panicking { inner, question, thread, after, asked: Arc::default() };
    let engine = memory.engine(Arc::new(source)).background(background).start().unwrap();
    does(&memory, &engine);
    let given_back: &[_] = if engine.stats().removed_pages > 0 { &[GIVEN_BACK] } else { &[] };
    let Some(Err(error)) = engine.wait_for(Duration::from_secs(20)) else {
        // It would be waited for without end.
        std::mem::forget(engine);
        panic!("{question:?} on {thread}: it goes on");
    };
    let cancelled = matches!(error, EngineError::Cancelled);
    // What is lost with the feed says so itself.
    let died = matches!(error, EngineError::ThreadDied(_))
        || question == Question::Finish && matches!(error, EngineError::Broken(_));
    assert!(cancelled || died, "{question:?} on {thread}: {error}");
    drop(engine);
    right_or_refused_or_zero(&memory, &oracle, given_back)
}

#[test]
fn a_source_that_panics_when_the_supervisor_asks_fails_the_engine() {
    testkit::require!(Userfaultfd);
    let (all, none) = (Background::default, Background::off);
    const ME: &str = "uffd-supervisor";
    // Everything is there when it asks. Who can't say what is zero is not believed that anything is.
    assert_eq!(refused(Question::Content, ME, 0, all(), |_, _| ()), PAGES / 2);
    assert_eq!(refused(Question::Finish, ME, 0, all(), |_, _| ()), 0);
    // As it poisons what is missing.
    for after in [0, 1] {
        assert_eq!(refused(Question::Content, ME, after, none(), |_, engine| engine.cancel()), PAGES);
    }
}

#[test]
fn a_source_that_panics_when_a_handler_asks_fails_the_engine() {
    testkit::require!(Userfaultfd);
    // At the first fault, or at the second.
    for (page, after) in [(ZERO, 0), (ZERO, 1), (STORED, 0), (STORED, 1)] {
        let touch = |memory: &Memory, engine: &Engine| {
            engine.discard(PageRun::single(BlockId(0), GIVEN_BACK)).unwrap();
            if after == 1 {
                assert!(memory.read(BlockId(0), STORED + PageCount(1)).is_ok_and(|bytes| bytes[0] == 1));
            }
            if let Ok(bytes) = memory.read(BlockId(0), page) {
                assert!(page == ZERO && bytes.iter().all(|&byte| byte == 0));
            }
        };
        let lost = refused(Question::Content, "uffd-fault-0", after, Background::off(), touch);
        assert!((PAGES / 2 - 2..=PAGES).contains(&lost), "{lost}");
    }
}

#[test]
fn a_source_that_panics_when_a_loader_asks_fails_the_engine() {
    testkit::require!(Userfaultfd);
    assert_eq!(refused(Question::Content, "uffd-load-0", 0, Background::default(), |_, _| ()), PAGES / 2);
}

/// There is no engine then, and the owner of the memory goes on.
#[test]
fn a_source_that_panics_when_it_is_started_leaves_no_engine() {
    testkit::require!(Userfaultfd, Poison);
    let oracle = oracle();
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let inner = MemorySource::new(Arc::clone(&oracle));
    let thread = "a_source_that_panics_when_it_is_started_leaves_no_engine";
    let source = Panicking { inner, question: Question::Start, thread, after: 0, asked: Arc::default() };
    let builder = memory.engine(Arc::new(source)).descriptor(memory.handed_over());
    assert!(catch_unwind(AssertUnwindSafe(|| builder.start())).is_err());
    assert_eq!(right_or_refused_or_zero(&memory, &oracle, &[]), PAGES);
}
