//! A sink for what has several ends.

use std::sync::Arc;

use page_units::PageRun;
use parking_lot::RwLock;

use crate::{End, PageBytes, PageSink, Reply, SinkError, SourceError};

/// Passes everything on to a sink, and the first end, and nothing after that: for a source that is made of others, or of
/// several threads.
#[derive(Debug)]
pub struct OneEnd {
    sink: Arc<dyn PageSink>,
    /// Whether the sink was told the end. Held for reading during every call into it.
    told: RwLock<bool>,
}

impl OneEnd {
    /// In front of `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn PageSink>) -> OneEnd {
        OneEnd { sink, told: RwLock::default() }
    }

    /// The flow was never started: nothing reaches the sink any more, not even an end.
    pub fn never_started(&self) {
        *self.told.write() = true;
    }

    fn pass(&self, pass: impl FnOnce(&dyn PageSink) -> Reply) -> Reply {
        let told = self.told.read();
        if *told { SinkError::stopped("the flow has ended").into() } else { pass(&*self.sink) }
    }
}

impl PageSink for OneEnd {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.pass(|sink| sink.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.pass(|sink| sink.zero(run))
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.pass(|sink| sink.absent(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.pass(|sink| sink.failed(run, error))
    }

    fn end(&self, end: End) {
        if !std::mem::replace(&mut *self.told.write(), true) {
            self.sink.end(end);
        }
    }
}
