//! Page sources for tests: one that answers at once from memory, and one that answers when and how it likes.

use std::ops::ControlFlow;
use std::sync::Arc;

use page_source::{Content, Feed, Flow, PageBytes, PageSink, PageSource, SourceError, Span, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun, RamBlock};

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

impl PageSource for MemorySource {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        known(&self.oracle, block, first, self.knows)
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(MemoryFeed { oracle: Arc::clone(&self.oracle), sink }))
    }
}

#[derive(Debug)]
struct MemoryFeed {
    oracle: Arc<Oracle>,
    sink: Arc<dyn PageSink>,
}

impl Feed for MemoryFeed {
    fn request(&self, run: PageRun, _: Urgency) {
        if deliver(&self.oracle, &*self.sink, run).is_break() {
            // The sink takes no more, and knows.
        }
    }
}

/// [`PageSource::run_at`] for the pages of an oracle.
pub(crate) fn known(oracle: &Oracle, block: BlockId, first: PageIndex, knows: bool) -> Span {
    let pages = oracle.layout().get(block).map_or(PageCount(0), RamBlock::pages);
    if first.0 >= pages.0 {
        return Span { content: Content::Unknown, pages: PageCount(0) };
    }
    let rest = PageRun::new(block, first, PageCount(pages.0 - first.0));
    match oracle.kinds(rest).next() {
        Some((run, zero)) if knows => {
            Span { content: if zero { Content::Zero } else { Content::Stored }, pages: run.pages }
        }
        _ => Span { content: Content::Unknown, pages: rest.pages },
    }
}

/// Gives a run of an oracle's pages to a sink.
pub(crate) fn deliver(oracle: &Oracle, sink: &dyn PageSink, run: PageRun) -> Flow {
    for (piece, zero) in oracle.kinds(run) {
        if zero {
            sink.zero(piece)?;
        } else {
            sink.data(piece, PageBytes::from_slice(oracle.run(piece)))?;
        }
    }
    ControlFlow::Continue(())
}
