//! A source that does what a test tells it to.

use std::sync::Arc;

use page_source::{End, Feed, Flow, PageBytes, PageSink, PageSource, SourceError, Span, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
use parking_lot::Mutex;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;

use super::PAGE;

/// One block, of which no page is zero and no two are the same.
pub(crate) fn full(pages: u64) -> Arc<Oracle> {
    let page = |number: u64| {
        let mut bytes = vec![u8::try_from(number % 251).unwrap() + 1; PAGE];
        bytes[..8].copy_from_slice(&(number + 1).to_be_bytes());
        bytes
    };
    Arc::new(Oracle::new([("ram", (0..pages).flat_map(page).collect())]).unwrap())
}

/// Answers nothing by itself. What was asked for is kept; the test pushes.
#[derive(Debug)]
pub(crate) struct Scripted {
    oracle: Arc<Oracle>,
    knows: MemorySource,
    at_start: AtStart,
    state: Arc<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtStart {
    Nothing,
    Everything,
    Error,
    Broken,
}

#[derive(Debug, Default)]
struct State {
    sink: Mutex<Option<Arc<dyn PageSink>>>,
    asked: Mutex<Vec<PageRun>>,
}

impl Scripted {
    pub(crate) fn new(oracle: Arc<Oracle>) -> Scripted {
        let knows = MemorySource::new(Arc::clone(&oracle)).knowing_nothing();
        Scripted { oracle, knows, at_start: AtStart::Nothing, state: Arc::default() }
    }

    /// Everything it has is in the sink when it has started.
    pub(crate) fn pushing_at_start(mut self) -> Scripted {
        self.at_start = AtStart::Everything;
        self
    }

    /// It can't be started.
    pub(crate) fn failing_at_start(mut self) -> Scripted {
        self.at_start = AtStart::Error;
        self
    }

    /// It says that it is broken before it has started.
    pub(crate) fn broken_at_start(mut self) -> Scripted {
        self.at_start = AtStart::Broken;
        self
    }

    pub(crate) fn push(&self, run: PageRun) -> Flow {
        let sink = self.state.sink.lock().clone().unwrap();
        sink.data(run, PageBytes::from_slice(self.oracle.run(run)))
    }

    pub(crate) fn end(&self) {
        let sink = self.state.sink.lock().clone().unwrap();
        sink.end(End::Complete);
    }

    /// What was asked for so far.
    pub(crate) fn asked(&self) -> Vec<PageRun> {
        self.state.asked.lock().clone()
    }

    /// The sink holds the source's engine, and that the source: the test is done with it.
    pub(crate) fn forget_sink(&self) {
        self.state.sink.lock().take();
    }
}

impl PageSource for Scripted {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        self.knows.run_at(block, first)
    }

    fn repeatable(&self) -> bool {
        false
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        *self.state.sink.lock() = Some(sink);
        match self.at_start {
            AtStart::Nothing => {}
            AtStart::Everything => {
                for all in self.layout().runs() {
                    let mut rest = all;
                    while !rest.is_empty() {
                        let (now, later) = rest.split_at(PageCount(100));
                        assert!(self.push(now).is_continue(), "{now} was refused");
                        rest = later;
                    }
                }
                self.forget_sink();
            }
            AtStart::Broken => {
                if let Some(sink) = self.state.sink.lock().take() {
                    sink.end(End::Broken(SourceError::Injected("it broke at once".into())));
                }
            }
            AtStart::Error => {
                self.forget_sink();
                return Err(SourceError::Injected("it can't be started".into()));
            }
        }
        Ok(Box::new(ScriptedFeed(Arc::clone(&self.state))))
    }
}

#[derive(Debug)]
struct ScriptedFeed(Arc<State>);

impl Feed for ScriptedFeed {
    fn request(&self, run: PageRun, _: Urgency) {
        self.0.asked.lock().push(run);
    }
}
