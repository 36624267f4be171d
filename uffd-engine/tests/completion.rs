//! Complete is what the page states say, not what was requested and answered.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{Kind, Memory};
use page_source::{Feed, PageBytes, PageSink, PageSource, Pages, SourceError, Span};
use page_units::{BlockId, Layout, PageCount, PageRun, PageSize, RamBlock};
use parking_lot::Mutex;
use testkit::gate::Gate;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Discards, PausePoint};

/// Lets the test push pages that nobody asked for, and counts how often the supervisor asks what there is.
#[derive(Debug)]
struct Pushing {
    inner: MemorySource,
    asked: Arc<AtomicU64>,
    sink: Arc<Mutex<Option<Arc<dyn PageSink>>>>,
}

impl Pages for Pushing {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        if std::thread::current().name() == Some("uffd-supervisor") {
            self.asked.fetch_add(1, Ordering::Relaxed);
        }
        self.inner.content(run)
    }
}

impl PageSource for Pushing {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        *self.sink.lock() = Some(Arc::clone(&sink));
        self.inner.start(sink)
    }
}

/// A page is claimed by the fault handler and not installed yet, everything else is there, and the same page comes once
/// more from elsewhere: nothing is outstanding any more, and still the engine must not let the memory go. It waits for the
/// install, and does not look again and again whether that is done.
#[test]
fn a_page_that_is_being_installed_is_waited_for() {
    testkit::require!(Userfaultfd);
    let block = RamBlock::new("ram", PageCount(64).to_bytes(), PageSize::SMALL).unwrap();
    let oracle = Arc::new(Oracle::random(1, Layout::new(vec![block]).unwrap(), 255));
    let run = oracle.layout().run_of(BlockId(0)).unwrap();
    let page = run.iter().find(|&page| !oracle.zero_at(BlockId(0), page)).unwrap();
    let one = PageRun::single(BlockId(0), page);
    for discards in [Discards::Announced, Discards::Events] {
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let sink = Arc::new(Mutex::new(None));
        let asked = Arc::new(AtomicU64::new(0));
        let inner = MemorySource::new(Arc::clone(&oracle));
        let source = Pushing { inner, asked: Arc::clone(&asked), sink: Arc::clone(&sink) };
        let gate = Gate::closed();
        let at_gate = gate.clone();
        let engine = memory
            .engine(Arc::new(source))
            .background(Background::default().paused())
            .discards(discards)
            .pauses(move |point| {
                if point == PausePoint::Claimed && std::thread::current().name() == Some("uffd-fault-0") {
                    at_gate.enter();
                }
            })
            .start()
            .unwrap();
        std::thread::scope(|scope| {
            let touching = scope.spawn(|| memory.load(BlockId(0), page));
            gate.wait_for(1);
            engine.resume_background();
            let push = sink.lock().clone().unwrap();
            assert!(push.data(one, PageBytes::from_slice(oracle.run(one))).is_taken());
            // Something that must not happen can only be waited for by the clock; what is right does not depend on it.
            let ended = engine.wait_for(Duration::from_millis(200));
            let asked = asked.load(Ordering::Relaxed);
            gate.open();
            assert!(ended.is_none(), "{ended:?}");
            // A look asks for each run of pages once, and there are few reasons to look.
            assert!((1..=8 * 64).contains(&asked), "{asked} questions");
            assert!(touching.join().unwrap() == oracle.run(one));
        });
        engine.wait().unwrap();
        memory.assert_equals(&oracle);
        // It holds the engine, and the engine's source holds it.
        sink.lock().take();
    }
}
