//! Why there is no live snapshot.

use std::io;
use std::path::PathBuf;

use mapped_ram::CreateError;
use page_source::{SinkError, SourceError};
use page_units::{ByteLen, GuestAddr, HostAddr, PageCount};
use uffd_engine::{EngineError, FreezeError, FrozenError};
use vmstate::WriteError;

use crate::StopError;
use crate::ram::MemoryError;
use crate::state::StateError;

/// Why there is no live snapshot. The guest goes on as it was, and there is no file, or the one that was there before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LiveError {
    /// The memory could not be loaded.
    #[error("the guest's memory could not be loaded: {0}")]
    Load(EngineError),
    /// Another live snapshot of the same memory is not complete yet.
    #[error("another live snapshot of this guest is not complete yet: wait for it, or cancel it")]
    Busy,
    /// The memory is still being loaded from the file that would be replaced.
    #[error(
        "{}: the guest's memory is still being loaded from this file, which can't be replaced before that is complete: wait for it, or choose another name",
        path.display()
    )]
    Source {
        /// The file.
        path: PathBuf,
    },
    /// Some of the memory has no content.
    #[error("{0} pages of the guest's memory could not be loaded, and can not be saved")]
    Poisoned(PageCount),
    /// Not every write to this memory could be caught.
    #[error(
        "guest memory at {guest} is {what}, of which a live snapshot could not catch every write: use anonymous memory, a memfd, or huge pages"
    )]
    Memory {
        /// Where the guest sees it.
        guest: GuestAddr,
        /// What it is.
        what: &'static str,
    },
    /// The guest's memory is mapped in this process a second time.
    #[error(
        "guest memory at {guest} is mapped at {start}..{end} too, where a live snapshot could not catch a write: unmap it, or do without this check if nothing is written there before the snapshot is complete"
    )]
    MappedTwice {
        /// Where the guest sees it.
        guest: GuestAddr,
        /// Where the other mapping has it.
        start: HostAddr,
        /// The byte after the last.
        end: HostAddr,
    },
    /// How this process maps the guest's memory could not be found out.
    #[error("reading /proc/self/maps failed: {0}")]
    Mappings(#[source] io::Error),
    /// The regions could not be made.
    #[error(transparent)]
    Regions(#[from] MemoryError),
    /// The file would not fit.
    #[error(
        "{}: up to {needed} bytes are needed, and {available} are free: free some space, or, if much of the memory is zero, do without this check",
        path.display()
    )]
    Space {
        /// The file.
        path: PathBuf,
        /// What exists of the memory, and what the rest of the file may take.
        needed: ByteLen,
        /// What the file system has.
        available: ByteLen,
    },
    /// The file system does not say how much is free.
    #[error("{}: asking for the free space failed: {error}", path.display())]
    Statistics {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The signals of writes that fail could not be blocked.
    #[error("blocking SIGXFSZ and SIGPIPE failed: {0}")]
    Signals(#[source] io::Error),
    /// The vCPUs did not stop, or one of them has failed.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The state could not be taken.
    #[error(transparent)]
    State(#[from] StateError),
    /// The caller can't make its devices stand still.
    #[error("the devices can't be made to stand still: {0}")]
    Drain(String),
    /// Which pages exist could not be found out.
    #[error("looking up which pages exist failed: {0}")]
    Populated(#[source] io::Error),
    /// The memory can't be write-protected.
    #[error(transparent)]
    Freeze(FreezeError),
    /// The file could not be begun.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The state does not fit a stream.
    #[error(transparent)]
    Encode(#[from] WriteError),
    /// The thread that saves could not be started.
    #[error(transparent)]
    Begin(SourceError),
    /// The frozen memory could not be saved whole: it was discarded, or the kernel refused something.
    #[error(transparent)]
    Frozen(FrozenError),
    /// The file could not be written or finished.
    #[error(transparent)]
    Write(SinkError),
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// The thread that saves is gone.
    #[error("the thread that saves has ended before its work was done")]
    Died,
}

impl From<FreezeError> for LiveError {
    fn from(error: FreezeError) -> LiveError {
        match error {
            FreezeError::Load(error) => LiveError::Load(*error),
            error => LiveError::Freeze(error),
        }
    }
}
