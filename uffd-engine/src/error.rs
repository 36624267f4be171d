//! Why an engine can't start, and why one failed.

use std::fmt;
use std::io;
use std::sync::Arc;

use page_source::SourceError;
use page_units::{ByteLen, HostAddr, PageRun};

use crate::Features;

/// What a system call said: a number of errno(3).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// The number, `EBUSY` for example.
    #[must_use]
    pub const fn number(self) -> i32 {
        self.0
    }

    pub(crate) fn of(errno: nix::errno::Errno) -> Errno {
        Errno(errno as i32)
    }

    pub(crate) fn from_io(error: &io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(0))
    }

    pub(crate) fn is(self, errno: nix::errno::Errno) -> bool {
        self == Errno::of(errno)
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from(*self).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&io::Error::from(*self), f)
    }
}

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Neither way is permitted.
    #[error(
        "no userfaultfd: /dev/userfaultfd: {device}; the system call: {syscall}. Give this user read and write access \
         to /dev/userfaultfd, or CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd=1"
    )]
    NotPermitted {
        /// What the device node said.
        device: io::Error,
        /// What the system call said.
        syscall: io::Error,
    },
    /// The kernel lacks something.
    #[error("this kernel's userfaultfd lacks {missing:?} (it has {available:?})")]
    Unsupported {
        /// What it lacks.
        missing: Features,
        /// What it has.
        available: Features,
    },
    /// The handshake with the kernel failed: the descriptor is none, or spent.
    #[error("the handshake with the kernel (UFFDIO_API) failed: {0}")]
    Handshake(#[source] io::Error),
    /// A descriptor that was handed over can't be used.
    #[error("the descriptor handed over can't be used: {0}")]
    Handover(#[source] io::Error),
}

/// Why an engine can't start. Nothing is registered then; of memory that was handed over, what is missing is poisoned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is no descriptor.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A region can't be.
    #[error("region at {start}, {length} bytes: {reason}")]
    Region {
        /// Where it begins.
        start: HostAddr,
        /// Its length.
        length: ByteLen,
        /// What is wrong with it.
        reason: String,
    },
    /// The kernel refused to register a region.
    #[error("registering the region at {start}, {length} bytes, with userfaultfd failed: {error}")]
    Register {
        /// Where it begins.
        start: HostAddr,
        /// Its length.
        length: ByteLen,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// The source can't be started.
    #[error("the source of the pages can't be started: {0}")]
    Source(#[from] SourceError),
    /// A thread, an event descriptor or memory is missing.
    #[error("{what}: {error}")]
    System {
        /// What was to be made.
        what: &'static str,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// No thread may run there.
    #[error("no thread can be bound to core {0}: it does not exist, or this process may not use it")]
    Core(usize),
    /// The builder lacks something.
    #[error("{0}")]
    Incomplete(&'static str),
}

/// Why an engine failed after it had started. What was missing then is poisoned: see [`FailurePolicy`].
///
/// [`FailurePolicy`]: crate::FailurePolicy
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The source has no content for some pages.
    #[error("pages {}..{} of RAM block \"{block}\": {error}", run.first, run.end())]
    Source {
        /// The name of their RAM block.
        block: Arc<str>,
        /// The pages.
        run: PageRun,
        /// What the source says.
        #[source]
        error: SourceError,
    },
    /// The source ended before it had delivered everything, or can't vouch for what it delivered.
    #[error("the source of the pages broke: {0}")]
    Broken(#[source] SourceError),
    /// The kernel refused to install pages. `ENOENT`: the memory there is not the engine's any more. `ENOMEM`: the machine,
    /// or the memory cgroup of this process, has no memory left.
    #[error(
        "installing pages {}..{} of RAM block \"{block}\" at {at} failed: {errno}{}", run.first, run.end(), hint(*errno)
    )]
    Install {
        /// The name of their RAM block.
        block: Arc<str>,
        /// The pages.
        run: PageRun,
        /// Where.
        at: HostAddr,
        /// What the kernel said.
        errno: Errno,
    },
    /// There is no huge page for some content.
    #[error(
        "no huge page is left for pages {}..{} of RAM block \"{block}\" at {at}: the pool is empty (vm.nr_hugepages, \
         vm.nr_overcommit_hugepages), or the hugetlb cgroup allows no more", run.first, run.end()
    )]
    NoHugePage {
        /// The name of their RAM block.
        block: Arc<str>,
        /// The pages.
        run: PageRun,
        /// Where.
        at: HostAddr,
    },
    /// The file behind shared memory holds a page that was still missing, and that the engine has not put there: what it holds
    /// is not the content.
    #[error(
        "pages {}..{} of RAM block \"{block}\" at {at} were touched through another mapping of the memory's file before \
         their content came: let device processes use the memory when the engine is complete, or say that its file is \
         filled on purpose (Builder::prefilled)", run.first, run.end()
    )]
    FilledElsewhere {
        /// The name of their RAM block.
        block: Arc<str>,
        /// The pages.
        run: PageRun,
        /// Where.
        at: HostAddr,
    },
    /// Pages of a huge granule could not be put together.
    #[error(
        "putting together the huge page of pages {}..{} of RAM block \"{block}\" failed: {error}", run.first, run.end()
    )]
    Staging {
        /// The name of their RAM block.
        block: Arc<str>,
        /// The pages.
        run: PageRun,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
    },
    /// The process that owns the memory is gone.
    #[error("the process that owns the guest's memory is gone")]
    OwnerGone,
    /// A page fault at an address that belongs to no region.
    #[error("a page fault at {0}, which belongs to no region of this engine")]
    StrayFault(HostAddr),
    /// Reading page faults failed.
    #[error("reading page faults failed: {0}")]
    Events(Errno),
    /// A thread of the engine panicked.
    #[error("a thread of the engine died: {0}")]
    ThreadDied(&'static str),
    /// An observer waits for its own engine, on the thread that would have to end it.
    #[error("the observer of an engine can't wait for it: it is called on the thread that ends the engine")]
    OnObserver,
    /// The engine was cancelled or dropped before it was complete.
    #[error("the engine was cancelled before all pages were there")]
    Cancelled,
}

/// What an error of an install means to the owner of the memory.
fn hint(errno: Errno) -> &'static str {
    match errno.number() {
        libc::ENOENT => " (it was unmapped, or something else is mapped there)",
        libc::ENOMEM => " (no memory is left, or the memory cgroup allows no more)",
        _ => "",
    }
}

/// Why a range could not be given back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscardError {
    /// Not (entirely) inside the engine's regions, or not whole granules.
    #[error("{0} is not inside the regions of this engine, in whole granules")]
    Outside(PageRun),
    /// A live snapshot still needs what is there. Nothing has happened to it: try again when the snapshot is over.
    #[error("a live snapshot that is being taken still needs the content of {0}")]
    Frozen(PageRun),
    /// The memory belongs to another process, which discards for itself.
    #[error("the memory belongs to another process")]
    Foreign,
    /// The system call failed.
    #[error("giving {run} back failed: {error}")]
    System {
        /// The pages.
        run: PageRun,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}
