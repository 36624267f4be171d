//! Page sources for tests: one that answers at once from memory, and one that answers when and how it likes.

use std::ops::ControlFlow;
use std::sync::Arc;

use page_source::{
    Answer, Content, EndGuard, Feed, PageBytes, PageSink, PageSource, Pages, Reply, SourceError, Span, Urgency,
};
use page_units::{Layout, PageRun};

use crate::oracle::Oracle;

/// Answers at once, on the calling thread, with what an [`Oracle`] says.
#[derive(Clone, Debug)]
pub struct MemorySource {
    oracle: Arc<Oracle>,
    knows: bool,
}

impl MemorySource {
    /// A source of `oracle`'s pages that knows which are zero.
    #[must_use]
    pub fn new(oracle: Arc<Oracle>) -> MemorySource {
        MemorySource { oracle, knows: true }
    }

    /// The same source, to which every page is [`Content::Unknown`].
    #[must_use]
    pub fn knowing_nothing(mut self) -> MemorySource {
        self.knows = false;
        self
    }

    /// The bytes behind it.
    #[must_use]
    pub fn oracle(&self) -> &Arc<Oracle> {
        &self.oracle
    }
}

impl Pages for MemorySource {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        known(&self.oracle, run, self.knows)
    }
}

impl PageSource for MemorySource {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(MemoryFeed { oracle: Arc::clone(&self.oracle), end: EndGuard::new(sink) }))
    }
}

#[derive(Debug)]
struct MemoryFeed {
    oracle: Arc<Oracle>,
    end: EndGuard,
}

impl Feed for MemoryFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        // If the sink takes no more, it knows.
        let _ = deliver(&self.oracle, self.end.sink(), run);
        Answer::Here
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

/// [`Pages::content`] for the pages of an oracle.
pub(crate) fn known(oracle: &Oracle, run: PageRun, knows: bool) -> Span {
    let run = oracle.layout().clip(run);
    match oracle.kinds(run).next() {
        Some((run, zero)) if knows => Span::new(if zero { Content::Zero } else { Content::Stored }, run.pages),
        _ => Span::new(Content::Unknown, run.pages),
    }
}

/// Gives a run of an oracle's pages to a sink.
pub(crate) fn deliver(oracle: &Oracle, sink: &dyn PageSink, run: PageRun) -> ControlFlow<Reply> {
    for (piece, zero) in oracle.kinds(run) {
        if zero {
            sink.zero(piece).branch()?;
        } else {
            let unreadable = |_| SourceError::stopped("the sink could not read memory of our own");
            page_source::deliver(sink, piece, PageBytes::from_slice(oracle.run(piece)), unreadable)?;
        }
    }
    ControlFlow::Continue(())
}
