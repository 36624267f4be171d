//! Why pages can't be had, or can't be taken.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use page_units::{ByteLen, FileOffset, LayoutError, PageRun};

/// Why a source can't deliver. Cheap to clone, since one error may end many pages.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Reading a file failed.
    #[error("{}: reading {length} bytes of RAM block \"{block}\" at file offset {offset} failed: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The RAM block.
        block: String,
        /// Where in the file.
        offset: FileOffset,
        /// How much was to be read.
        length: ByteLen,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
    },
    /// The file ends before the page data that it should hold.
    #[error("{}: RAM block \"{block}\" needs bytes up to file offset {needed}, but the file ends at {actual}: it was truncated or is still being written", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The RAM block.
        block: String,
        /// The first byte after the block's data.
        needed: FileOffset,
        /// The end of the file.
        actual: FileOffset,
    },
    /// The file was replaced or written to while it was in use.
    #[error("{}: {what} changed while pages were being loaded from it (RAM block \"{block}\", file offset {offset}): keep a snapshot file unchanged while a guest runs from it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different: size, modification time, ...
        what: &'static str,
        /// The RAM block that was being read.
        block: String,
        /// Where in the file.
        offset: FileOffset,
    },
    /// The file was replaced or written to since it was opened: whatever was delivered from it can't be trusted.
    #[error("{}: {what} changed since it was opened, so what was loaded from it can't be trusted: keep a snapshot file unchanged while a guest runs from it", path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// What is different: size, modification time, ...
        what: &'static str,
    },
    /// The file can't be opened, mapped, or made sense of.
    #[error("{}: {reason}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The RAM blocks do not fit what is being loaded.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A peer went away or broke the protocol.
    #[error("{peer}: {reason}")]
    Peer {
        /// Who.
        peer: String,
        /// What happened.
        reason: String,
    },
    /// The flow was stopped on this side.
    #[error("the flow of pages was stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
    /// A test asked for this failure.
    #[error("injected failure: {0}")]
    Injected(String),
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
    File(#[source] Arc<dyn std::error::Error + Send + Sync>),
    /// The pages could not be read from the source's memory while they were being taken.
    #[error("taking pages failed: {error}")]
    Source {
        /// What went wrong.
        #[source]
        error: SourceError,
    },
    /// The lent bytes are not there any more: the kernel answered `EFAULT`, as it does where a mapped file was
    /// truncated. The source that lent them ends the run with [`PageSink::failed`](crate::PageSink::failed) and an
    /// error that names the file.
    #[error("the bytes to be taken are gone: {0}")]
    Unreadable(PageRun),
    /// Whoever takes the pages was cancelled, or has ended.
    #[error("no more pages are taken: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}
