//! Why pages can't be delivered, or can't be taken.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use page_units::{FileOffset, LayoutError, PageRun};

/// What kind of thing went wrong with a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceErrorKind {
    /// Storage does not give the bytes, or can't be opened.
    Unreadable,
    /// What is read was replaced or written to while it was in use: nothing that came from it can be trusted.
    Changed,
    /// It ends before the content that it should hold.
    Truncated,
    /// It is not what it should be: another format, another layout, a wrong checksum.
    Corrupt,
    /// A peer, or a thread that answers, is gone.
    PeerGone,
    /// A peer, or a source, does not keep to the rules.
    Protocol,
    /// The flow was stopped on this side.
    Stopped,
}

/// What an error concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Subject {
    /// The file.
    pub path: Option<PathBuf>,
    /// The other side of a connection.
    pub peer: Option<String>,
    /// The RAM block.
    pub block: Option<String>,
    /// The pages.
    pub run: Option<PageRun>,
    /// Where in the file or stream.
    pub offset: Option<FileOffset>,
}

impl Subject {
    /// Nothing in particular.
    #[must_use]
    pub fn none() -> Subject {
        Subject::default()
    }

    /// A file.
    #[must_use]
    pub fn file(path: impl AsRef<Path>) -> Subject {
        Subject { path: Some(path.as_ref().to_owned()), ..Subject::default() }
    }

    /// The other side of a connection.
    #[must_use]
    pub fn peer(name: impl Into<String>) -> Subject {
        Subject { peer: Some(name.into()), ..Subject::default() }
    }

    /// In this RAM block.
    #[must_use]
    pub fn block(mut self, name: impl Into<String>) -> Subject {
        self.block = Some(name.into());
        self
    }

    /// These pages.
    #[must_use]
    pub fn run(mut self, run: PageRun) -> Subject {
        self.run = Some(run);
        self
    }

    /// At this offset.
    #[must_use]
    pub fn at(mut self, offset: FileOffset) -> Subject {
        self.offset = Some(offset);
        self
    }
}

/// Why a source can't deliver: a kind, what it concerns, what happened, and perhaps a cause. Cheap to clone, since one
/// error may end many pages.
#[derive(Clone, Debug)]
pub struct SourceError(Arc<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    kind: SourceErrorKind,
    subject: Subject,
    what: String,
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl SourceError {
    /// An error of this kind. `what` says in words what happened; it is shown behind the name of the file or peer. It may
    /// be empty if a [cause](SourceError::with_cause) says it all.
    #[must_use]
    pub fn new(kind: SourceErrorKind, subject: Subject, what: impl Into<String>) -> SourceError {
        SourceError(Arc::new(Inner { kind, subject, what: what.into(), cause: None }))
    }

    /// The flow was stopped on this side, and why.
    #[must_use]
    pub fn stopped(reason: impl fmt::Display) -> SourceError {
        let what = format!("the flow of pages was stopped: {reason}");
        SourceError::new(SourceErrorKind::Stopped, Subject::none(), what)
    }

    /// The same with a cause, which is shown at the end.
    #[must_use]
    pub fn with_cause(self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> SourceError {
        let inner = Inner { cause: Some(Arc::from(cause.into())), ..(*self.0).clone() };
        SourceError(Arc::new(inner))
    }

    /// Which kind.
    #[must_use]
    pub fn kind(&self) -> SourceErrorKind {
        self.0.kind
    }

    /// What it concerns.
    #[must_use]
    pub fn subject(&self) -> &Subject {
        &self.0.subject
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { subject, what, cause, .. } = &*self.0;
        if let Some(path) = &subject.path {
            write!(f, "{}: ", path.display())?;
        } else if let Some(peer) = &subject.peer {
            write!(f, "{peer}: ")?;
        }
        match cause {
            Some(cause) if what.is_empty() => write!(f, "{cause}"),
            Some(cause) => write!(f, "{what}: {cause}"),
            None => f.write_str(what),
        }
    }
}

impl Error for SourceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.cause.as_deref().map(|cause| cause as &(dyn Error + 'static))
    }
}

impl From<LayoutError> for SourceError {
    fn from(error: LayoutError) -> SourceError {
        SourceError::new(SourceErrorKind::Corrupt, Subject::none(), "the RAM blocks do not fit").with_cause(error)
    }
}

/// Why a sink takes no more pages.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// Writing failed.
    #[error("{target}: writing at offset {offset} failed: {error}")]
    Write {
        /// The file or socket.
        target: String,
        /// Where in it.
        offset: FileOffset,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
    },
    /// The file can't be made, or not be given its name. The message names it.
    #[error("{0}")]
    File(#[source] Arc<dyn Error + Send + Sync>),
    /// The source has failed, or has ended too early.
    #[error("taking pages failed: {error}")]
    Source {
        /// What went wrong.
        #[source]
        error: SourceError,
    },
    /// The source has nothing to say about these pages, and there is nothing below it.
    #[error(
        "{0}: neither content nor zeros, but a reference to a layer below, and there is none: load it together with its base"
    )]
    Absent(PageRun),
    /// The sink was cancelled, or has ended.
    #[error("no more pages are taken: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl SinkError {
    /// The sink was cancelled, or has ended, and why.
    #[must_use]
    pub fn stopped(reason: impl fmt::Display) -> SinkError {
        SinkError::Stopped { reason: reason.to_string() }
    }
}
