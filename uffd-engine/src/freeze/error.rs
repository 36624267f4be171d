//! Why memory can't be frozen, or could not be delivered whole.

use std::io;

use nix::errno::Errno;
use page_source::{SinkError, SourceError};
use page_units::{ByteLen, HostAddr, PageCount, PageRun};

use crate::{EngineError, OpenError, StartError};

/// Why memory can't be frozen. The guest's memory is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// There is no descriptor, or the kernel can't write-protect this memory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The regions can't be, or a thread or memory is missing.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The memory could not be loaded.
    #[error("the memory could not be loaded: {0}")]
    Load(#[source] Box<EngineError>),
    /// The engine became complete before the freeze point, and there is no descriptor to freeze the memory without it.
    #[error("the memory has become complete, and can't be frozen without its engine: {0}")]
    NoHeir(String),
    /// Equal pages of the memory may be merged (KSM), which drops their write protection, and that can't be switched off.
    #[error("{length} bytes at {start} can't be taken out of the merging of equal pages (KSM): {error}")]
    Mergeable {
        /// Where.
        start: HostAddr,
        /// How much.
        length: ByteLen,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Which pages there are could not be found out.
    #[error("looking up which pages exist failed: {0}")]
    Populated(#[source] io::Error),
    /// The memory is frozen already.
    #[error("this memory is frozen already")]
    Busy,
    /// The engine serves other regions than those.
    #[error("the engine does not serve exactly these regions: see {start}")]
    OtherRegions {
        /// A region of either that the other lacks.
        start: HostAddr,
    },
    /// The memory belongs to another process.
    #[error("the memory belongs to another process, which alone can read it")]
    Foreign,
    /// The kernel refused to register or to write-protect a range. `EBUSY`: another userfaultfd has it, that of an
    /// engine which is still loading.
    #[error("write-protecting {length} bytes at {start} failed: {errno}")]
    Arm {
        /// Where.
        start: HostAddr,
        /// How much.
        length: ByteLen,
        /// What the kernel said.
        errno: crate::Errno,
    },
}

/// Why frozen memory could not be delivered whole. The guest goes on, and its memory is as it should be.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrozenError {
    /// The sink takes no more.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The guest gave back memory that was not saved yet.
    #[error(
        "pages at {start}..{end} were given back (a balloon?) before they were saved: hold discards off while a snapshot is taken"
    )]
    Discarded {
        /// First byte.
        start: HostAddr,
        /// The byte after the last.
        end: HostAddr,
    },
    /// The file behind shared memory has lost pages since the freeze point, or somebody else has made some: what was there
    /// then can't be told any more.
    #[error(
        "the file behind the memory at {start} holds {found} pages, and not {expected}: something has punched it (fallocate) or written to it past the guest's memory while a snapshot was taken"
    )]
    FileChanged {
        /// First byte of the memory.
        start: HostAddr,
        /// How many pages it would hold.
        expected: PageCount,
        /// How many it holds.
        found: PageCount,
    },
    /// The kernel refused something.
    #[error("{what} at {at} failed: {errno}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Where.
        at: HostAddr,
        /// What the kernel said.
        errno: crate::Errno,
    },
    /// The memory is still being loaded, and its source has no content for pages that are missing.
    #[error("{run}, still missing in memory: {error}")]
    Source {
        /// The pages, as the source counts them.
        run: PageRun,
        /// What the source says.
        #[source]
        error: SourceError,
    },
    /// The source that the memory is being loaded from is not what it was: nothing that came from it can be trusted.
    #[error("the source that the memory is loaded from has changed: {0}")]
    Changed(#[source] SourceError),
    /// The memory is still being loaded, and that has failed or was given up.
    #[error("the engine that loads the memory has ended: {0}")]
    Engine(#[source] Box<EngineError>),
    /// The content of pages could not be loaded: they are poisoned.
    #[error("{0} could not be loaded, and has no content")]
    Poisoned(PageRun),
    /// The thread that saves has died. This is a defect.
    #[error("the thread that saves frozen memory has died")]
    Died,
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
}

impl FrozenError {
    pub(crate) fn kernel(what: &'static str, at: HostAddr, errno: Errno) -> FrozenError {
        FrozenError::Kernel { what, at, errno: crate::Errno::of(errno) }
    }

    pub(crate) fn io(what: &'static str, at: HostAddr, error: &io::Error) -> FrozenError {
        FrozenError::kernel(what, at, Errno::from_raw(error.raw_os_error().unwrap_or(0)))
    }
}
