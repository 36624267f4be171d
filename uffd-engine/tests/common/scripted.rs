//! A source that does what a test tells it to.

use std::sync::Arc;

use page_source::{Answer, End, EndGuard, Feed, OneShot, PageBytes, PageSink, Pages, Reply, SourceError, Urgency};
use page_units::{PageCount, PageRun};
use parking_lot::Mutex;
use testkit::faults::injected;
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

/// Answers nothing by itself. What was asked for is kept; the test pushes, through any of the clones.
#[derive(Clone, Debug)]
pub(crate) struct Scripted {
    oracle: Arc<Oracle>,
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
    end: Mutex<Option<EndGuard>>,
    asked: Mutex<Vec<PageRun>>,
}

impl Scripted {
    pub(crate) fn new(oracle: Arc<Oracle>) -> Scripted {
        Scripted { oracle, at_start: AtStart::Nothing, state: Arc::default() }
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

    /// The same, for an engine.
    pub(crate) fn peer(&self) -> Box<Scripted> {
        Box::new(self.clone())
    }

    pub(crate) fn push(&self, run: PageRun) -> Reply {
        let sink = self.state.sink.lock().clone().unwrap();
        sink.data(run, PageBytes::from_slice(self.oracle.run(run)))
    }

    pub(crate) fn end(&self) {
        self.state.end.lock().take().unwrap().end(End::Complete);
    }

    /// What was asked for so far.
    pub(crate) fn asked(&self) -> Vec<PageRun> {
        self.state.asked.lock().clone()
    }
}

impl OneShot for Scripted {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::new(MemorySource::new(Arc::clone(&self.oracle)).knowing_nothing())
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        if self.at_start == AtStart::Error {
            return Err(injected("it can't be started"));
        }
        *self.state.sink.lock() = Some(Arc::clone(&sink));
        *self.state.end.lock() = Some(EndGuard::new(sink));
        match self.at_start {
            AtStart::Nothing | AtStart::Error => {}
            AtStart::Everything => {
                for piece in self.oracle.layout().runs().flat_map(|all| all.pieces(PageCount(100))) {
                    assert!(self.push(piece).is_taken(), "{piece} was refused");
                }
            }
            AtStart::Broken => {
                if let Some(end) = self.state.end.lock().take() {
                    end.end(End::Broken(injected("it broke at once")));
                }
            }
        }
        Ok(Box::new(ScriptedFeed(Arc::clone(&self.state))))
    }
}

#[derive(Debug)]
struct ScriptedFeed(Arc<State>);

impl Feed for ScriptedFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        self.0.asked.lock().push(run);
        Answer::Later
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

impl Drop for ScriptedFeed {
    fn drop(&mut self) {
        drop(self.0.end.lock().take());
    }
}
