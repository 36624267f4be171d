//! A started flow, and how it ends.

use std::fmt::Debug;
use std::sync::Arc;
use std::thread;

use page_units::PageRun;
use parking_lot::Mutex;

use crate::{End, PageSink, SourceError};

/// A started flow, owned by who takes the pages.
///
/// # Dropping
/// Dropping a feed ends the flow without asking whether all was well: the source joins its threads, and
/// [`end`](PageSink::end) comes before the drop returns. Afterwards, as after [`finish`](Feed::finish), there is no call
/// into the sink. A feed is neither finished nor dropped inside a call into the sink.
pub trait Feed: Debug + Send + Sync {
    /// Asks for pages. Each page of `run` then ends exactly once for this request, in [`data`](PageSink::data),
    /// [`zero`](PageSink::zero), [`absent`](PageSink::absent) or [`failed`](PageSink::failed), in runs of the source's
    /// choosing, unless the flow ends or the sink says [`Stop`](crate::Reply::Stop) before.
    ///
    /// Never waits for content that comes from another machine or another thread: such a source queues the request,
    /// answers from a thread of its own, and says [`Answer::Later`].
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer;

    /// Ends the flow, and says whether what was delivered is still true: nothing was replaced, written to or cut off since
    /// the source was opened. May wait, for storage or a peer; the [`end`](PageSink::end) comes before it returns, if it
    /// did not come before.
    ///
    /// # Errors
    /// If something changed: nothing that was delivered can be trusted then.
    fn finish(self: Box<Self>) -> Result<(), SourceError>;
}

/// Who answers a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The thread that asked: all of the run was answered before the call returned.
    Here,
    /// Another thread: it may have been answered, or will be.
    Later,
}

/// How urgent a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Somebody stands still until the page arrives. Overtakes everything in the background.
    Demand,
    /// Fills the rest, as fast as it goes without hurting demand.
    Background,
}

/// Sees to it that a flow ends exactly once, however its threads do: every source holds one for each thread that pushes,
/// or, if it pushes on the threads of those who ask, in its feed.
///
/// When the last clone is dropped, the sink is told how the flow ended: as [`end`](EndGuard::end) has said, or
/// [`End::Broken`] if a thread panicked that held one, or else [`End::Stopped`].
#[derive(Clone, Debug)]
pub struct EndGuard {
    flow: Arc<Flow>,
}

#[derive(Debug)]
struct Flow {
    sink: Arc<dyn PageSink>,
    end: Mutex<Option<End>>,
}

impl EndGuard {
    /// For a flow into `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn PageSink>) -> EndGuard {
        EndGuard { flow: Arc::new(Flow { sink, end: Mutex::new(Some(End::Stopped)) }) }
    }

    /// Where the pages go.
    #[must_use]
    pub fn sink(&self) -> &dyn PageSink {
        &*self.flow.sink
    }

    /// Notes how the flow ends; the sink is told when the last clone is gone. [`End::Broken`] counts more than
    /// [`End::Complete`], and that more than [`End::Stopped`], and what was noted first more than what comes later.
    pub fn note(&self, end: End) {
        self.flow.note(end);
    }

    /// Notes how the flow ends, and lets go.
    pub fn end(self, end: End) {
        self.note(end);
    }

    /// The flow was never started: the sink is told nothing.
    pub fn never_started(self) {
        *self.flow.end.lock() = None;
    }
}

impl Drop for EndGuard {
    fn drop(&mut self) {
        if thread::panicking() {
            self.flow.note(End::Broken(SourceError::stopped("a thread of the source panicked")));
        }
    }
}

impl Flow {
    fn note(&self, end: End) {
        let mut noted = self.end.lock();
        match (&*noted, &end) {
            (Some(End::Stopped), _) | (Some(End::Complete), End::Broken(_)) => *noted = Some(end),
            _ => {}
        }
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(end) = self.end.get_mut().take() {
            self.sink.end(end);
        }
    }
}
