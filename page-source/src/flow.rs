//! The contract between who has pages and who takes them.

use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::Arc;

use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};

use crate::{PageBytes, SinkError, SourceError};

/// Where pages come from.
///
/// # Implementing
/// - The layout never changes.
/// - Everything else happens through the [`Feed`] that [`start`](PageSource::start) returns.
/// - A source may be started more than once, each time with another sink, unless its documentation says otherwise.
pub trait PageSource: Debug + Send + Sync {
    /// The RAM blocks it has pages of.
    fn layout(&self) -> &Layout;

    /// What is known of the pages from `first` on: the longest span of one kind that is cheap to tell, at least one
    /// page and never past the end of the block. Does no I/O: what would need some is [`Content::Unknown`] until a
    /// request has made it known.
    ///
    /// A page outside the layout has no content: the span is then empty.
    fn run_at(&self, block: BlockId, first: PageIndex) -> Span;

    /// As [`run_at`](PageSource::run_at), but at most so many pages: for whoever wants to know no more, in RAM of any
    /// size.
    fn run_within(&self, block: BlockId, first: PageIndex, most: PageCount) -> Span {
        let span = self.run_at(block, first);
        Span { pages: span.pages.min(most), ..span }
    }

    /// Whether a page may be asked for again after it was delivered. A file: yes. A postcopy peer, which sends each
    /// page once: no.
    fn repeatable(&self) -> bool {
        true
    }

    /// Whether what was delivered is still what the source holds: nothing was replaced, written to or cut off since it
    /// was opened. Whoever takes the pages calls it before it declares them complete, since a file that is truncated
    /// and written again in place reads as zeros for a moment, without an error.
    ///
    /// Costs a system call or so; never waits for a peer.
    ///
    /// # Errors
    /// If something changed: then nothing that was delivered can be trusted.
    fn verify(&self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Begins to push into `sink` what is requested through the feed (and what the source sends unasked).
    ///
    /// # Errors
    /// If the source can't be read at all; nothing was pushed then.
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError>;
}

/// A started flow, owned by whoever takes the pages.
///
/// # Dropping
/// Dropping a feed ends the flow: it joins the source's threads for it, and there is no call into the sink
/// afterwards. It must not be dropped inside a call into the sink.
pub trait Feed: Debug + Send + Sync {
    /// Asks for pages. Each page of `run` then ends exactly once for this request: in [`PageSink::data`],
    /// [`PageSink::zero`] or [`PageSink::failed`], in runs of the source's choosing, from this thread (before the
    /// call returns) or another.
    ///
    /// Never waits for content that has to come from elsewhere: a source that can't answer from what this machine
    /// has at hand (its page cache or its disk) queues the request and answers from its own thread.
    fn request(&self, run: PageRun, urgency: Urgency);

    /// Whether requests can still be answered. A source whose thread has died says so through [`PageSink::end`] if it
    /// can; whoever waits for pages asks here now and then, so as not to wait for ever for one that could not. Once
    /// it is `false`, pages that have been asked for and have not ended never will.
    fn alive(&self) -> bool {
        true
    }
}

/// How much a request hurries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Somebody stands still until the page arrives. Overtakes everything in the background.
    Demand,
    /// Fills the rest, as fast as it goes without hurting demand.
    Background,
}

/// What is known of a span of pages without I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// All zero: it need not be asked for.
    Zero,
    /// The source has content for them, which may be zero or not.
    Stored,
    /// Not known before it was asked for.
    Unknown,
}

/// So many pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// What they are.
    pub content: Content,
    /// How many.
    pub pages: PageCount,
}

/// Where pages go.
///
/// Every method may be called from any thread, several at a time, but never after the feed was dropped. Pages may
/// arrive that nobody asked for, and pages may arrive twice. A run given to a sink always lies inside the layout of
/// the source; a sink still checks it against its own.
///
/// A sink never calls [`Feed::request`] from inside these methods.
pub trait PageSink: Debug + Send + Sync {
    /// The content of a run of pages. `bytes` is exactly as long as `run`, and valid only during the call.
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow;

    /// A run of pages that are all zero.
    fn zero(&self, run: PageRun) -> Flow;

    /// A run of pages whose content can't be had.
    fn failed(&self, run: PageRun, error: SourceError) -> Flow;

    /// The source will push nothing more. Called at most once. Only [`End::Complete`] allows a sink to take pages it
    /// has not seen for zero, or to publish its file.
    fn end(&self, end: End);
}

/// Whether the source should go on. [`ControlFlow::Break`] says that the sink takes no more, and why.
pub type Flow = ControlFlow<SinkError>;

/// How a flow ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Every page that is not zero was delivered.
    Complete,
    /// Something is missing.
    Broken(SourceError),
}
