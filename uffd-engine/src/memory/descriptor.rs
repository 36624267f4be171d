//! The userfaultfd that an engine serves.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::raw::c_void;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use page_units::{ByteLen, HostAddr};
use userfaultfd::{RegisterMode, Uffd};

use crate::OpenError;
use crate::sys::abi::Features;
use crate::sys::open;

/// A userfaultfd, made here or handed over.
#[derive(Debug)]
pub struct Descriptor {
    uffd: Uffd,
    features: Features,
    /// What the kernel has besides; of a descriptor that was handed over, nothing more is known.
    kernel: Features,
    foreign: bool,
}

impl Descriptor {
    /// What this kernel offers. Opens a descriptor for the question, since the answer spends it.
    ///
    /// # Errors
    /// If this process may have none.
    pub fn kernel_features() -> Result<Features, OpenError> {
        let fd = open::new_descriptor(true)?;
        open::handshake(&fd, Features::empty()).map_err(OpenError::Handshake)
    }

    /// A descriptor for memory of this process, with these features, and with those of `welcome` that the kernel has.
    pub(crate) fn create(needed: Features, welcome: Features, nonblocking: bool) -> Result<Descriptor, OpenError> {
        let available = Descriptor::kernel_features()?;
        if !available.contains(needed) {
            return Err(OpenError::Unsupported { missing: needed - available, available });
        }
        let features = needed | (welcome & available);
        let fd = open::new_descriptor(nonblocking)?;
        open::handshake(&fd, features).map_err(OpenError::Handshake)?;
        Ok(Descriptor { uffd: into_uffd(fd), features, kernel: available, foreign: false })
    }

    /// A descriptor that came from elsewhere, usually from another process over a socket: its handshake is done and
    /// its regions are registered. `features` is what its owner asked for; with [`Features::EVENT_REMOVE`] the engine
    /// expects events.
    ///
    /// It is set to non-blocking, for its owner too if that kept a copy.
    ///
    /// # Errors
    /// If its flags can't be changed: it is no open descriptor.
    pub fn handed_over(fd: OwnedFd, features: Features) -> Result<Descriptor, OpenError> {
        set_blocking(fd.as_fd(), false).map_err(|errno| OpenError::Handover(errno.into()))?;
        Ok(Descriptor { uffd: into_uffd(fd), features, kernel: features, foreign: true })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// What the kernel has, whether it was asked for here or not.
    pub(crate) fn kernel(&self) -> Features {
        self.kernel
    }

    /// Whether its memory may belong to another process.
    pub(crate) fn foreign(&self) -> bool {
        self.foreign
    }

    pub(crate) fn register(&self, start: HostAddr, len: ByteLen, mode: RegisterMode) -> io::Result<()> {
        self.uffd.register_with_mode(pointer(start), len.get(), mode).map(drop).map_err(system)
    }

    pub(crate) fn unregister(&self, start: HostAddr, len: ByteLen) -> io::Result<()> {
        self.uffd.unregister(pointer(start), len.get()).map_err(system)
    }

    pub(crate) fn wake(&self, start: HostAddr, len: ByteLen) -> io::Result<()> {
        self.uffd.wake(pointer(start), len.get()).map_err(system)
    }
}

impl Descriptor {
    /// Makes ordinary memory of a range: its waiters go on.
    ///
    /// The kernel wakes the waiters of a range *before* it takes the range out (`userfaultfd_unregister` of Linux
    /// 6.18), and a fault that takes only the lock of its mapping can still begin to wait in between: it would wait
    /// for ever. So they are woken once more, afterwards.
    pub(crate) fn let_go(&self, start: HostAddr, len: ByteLen) {
        for done in [self.unregister(start, len), self.wake(start, len)] {
            if let Err(error) = done {
                // The owner unmapped it, or is gone: nobody waits there any more.
                log::debug!("unregistering {len} bytes at {start} failed: {error}");
            }
        }
    }

    /// Whether a read waits for a message. Not to be changed while somebody else reads.
    pub(crate) fn set_blocking(&self, blocking: bool) -> nix::Result<()> {
        set_blocking(self.fd(), blocking)
    }
}

fn system(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno) => io::Error::from_raw_os_error(errno as i32),
        other => io::Error::other(other),
    }
}

fn set_blocking(fd: BorrowedFd<'_>, blocking: bool) -> nix::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, !blocking);
    fcntl(fd, FcntlArg::F_SETFL(flags)).map(drop)
}

/// An address as the `userfaultfd` crate takes it; nothing dereferences it.
fn pointer(addr: HostAddr) -> *mut c_void {
    std::ptr::without_provenance_mut(ByteLen(addr.0).get())
}

fn into_uffd(fd: OwnedFd) -> Uffd {
    crate::sys::own_uffd(fd.into_raw_fd())
}
