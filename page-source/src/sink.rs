//! Who takes pages.

use std::fmt::Debug;
use std::ops::ControlFlow;

use page_units::PageRun;

use crate::{PageBytes, SinkError, SourceError};

/// Where pages go.
///
/// Every method may be called from any thread, several at a time, but never after the feed was finished or dropped. Pages
/// may arrive that nobody asked for, and pages may arrive twice, with the same content. A run given to a sink always lies
/// inside the layout of the source; a sink still checks it against its own.
///
/// A sink never calls into the [`Feed`](crate::Feed) from inside these methods.
pub trait PageSink: Debug + Send + Sync {
    /// The content of a run of pages. `bytes` is exactly as long as `run`, and valid only during the call.
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply;

    /// A run of pages that are all zero.
    fn zero(&self, run: PageRun) -> Reply;

    /// A run of pages about which the source has nothing to say: look below. A sink below which there is nothing answers
    /// with [`SinkError::Absent`], and never takes it for zeros.
    fn absent(&self, run: PageRun) -> Reply;

    /// A run of pages whose content is not there.
    fn failed(&self, run: PageRun, error: SourceError) -> Reply;

    /// The source pushes nothing more. Called exactly once for a flow whose start succeeded. Only [`End::Complete`] allows
    /// a sink to take pages that it has not seen for zero.
    fn end(&self, end: End);
}

/// What a sink says to what it is given.
#[derive(Clone, Debug)]
#[must_use]
pub enum Reply {
    /// The source goes on.
    Taken,
    /// The lent bytes of this part of the run could not be read: the kernel answered `EFAULT`, as it does where a mapped
    /// file was truncated. What lies before it was taken, and what lies behind it was not looked at. The source answers
    /// all that was not taken with [`PageSink::failed`] and an error that names the file, and goes on.
    Unreadable(PageRun),
    /// No more is taken, and why. The source gives up what it is delivering; what is requested in spite of that may be
    /// delivered, and is refused again.
    Stop(SinkError),
}

impl Reply {
    /// Whether the source simply goes on.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        matches!(self, Reply::Taken)
    }

    /// For `?`: breaks with everything but [`Reply::Taken`].
    pub fn branch(self) -> ControlFlow<Reply> {
        match self {
            Reply::Taken => ControlFlow::Continue(()),
            other => ControlFlow::Break(other),
        }
    }
}

/// Gives pages to a sink as every source has to: what the sink could not read fails, with the error that `unreadable` makes
/// for these pages, and the source goes on. Breaks if the sink takes no more.
pub fn deliver(
    sink: &dyn PageSink,
    run: PageRun,
    bytes: PageBytes<'_>,
    unreadable: impl FnOnce(PageRun) -> SourceError,
) -> ControlFlow<Reply> {
    match sink.data(run, bytes) {
        Reply::Unreadable(gone) => {
            // And what comes behind it: nobody has looked at that.
            let first = run.intersect(gone).first.max(run.first);
            let (_, rest) = run.split_at(first - run.first);
            sink.failed(rest, unreadable(rest)).branch()
        }
        reply => reply.branch(),
    }
}

impl From<ControlFlow<Reply>> for Reply {
    fn from(flow: ControlFlow<Reply>) -> Reply {
        match flow {
            ControlFlow::Continue(()) => Reply::Taken,
            ControlFlow::Break(reply) => reply,
        }
    }
}

impl From<SinkError> for Reply {
    fn from(error: SinkError) -> Reply {
        Reply::Stop(error)
    }
}

/// How a flow ended.
#[derive(Clone, Debug)]
pub enum End {
    /// Every page that is not zero was delivered: said by a source that knows it by itself (a stream, frozen memory), and
    /// by a driver that has asked for everything ([`pump`](crate::pump)).
    Complete,
    /// It was ended from this side: finished or dropped. What was requested was delivered; nothing is said of the rest.
    Stopped,
    /// Something is missing, or what was delivered is not true any more.
    Broken(SourceError),
}
