//! Reading guest memory of this process without dying of it: a page that is poisoned, can't be swapped in, or was cut off its
//! file is an error and no SIGBUS.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::mman::{MmapAdvise, madvise};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use page_units::{ByteLen, HostAddr};

/// How a range of guest memory is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reading {
    /// With plain loads, of pages that were brought into the page table before: nobody can take them away.
    Loads,
    /// By the kernel, which costs twice as much: the file behind the memory may become shorter at any time.
    Call,
}

impl Reading {
    /// Private memory, and a file that can't become shorter (`F_SEAL_SHRINK` of fcntl(2)), keep what was populated.
    pub(crate) fn of(file: Option<&File>) -> Reading {
        let sealed = |file: &File| {
            let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_truncate);
            seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK))
        };
        if file.is_none_or(sealed) { Reading::Loads } else { Reading::Call }
    }

    /// Copies write-protected guest memory. Nobody writes to it meanwhile; a writer that goes around the protection (which
    /// the owner of the memory rules out) could only make the copy a mixture.
    ///
    /// # Errors
    /// `EFAULT` (or `EHWPOISON`) if it can't be read.
    pub(crate) fn read(self, at: HostAddr, to: &mut [u8]) -> Result<(), Errno> {
        match self {
            Reading::Call => call(at, to),
            Reading::Loads => match populate(at, to.len()) {
                Ok(()) => {
                    load(at, to);
                    Ok(())
                }
                // Before Linux 5.14.
                Err(Errno::EINVAL) => call(at, to),
                Err(errno) => Err(errno),
            },
        }
    }

    /// The same for a page that somebody has just touched, and waits for: it is there.
    pub(crate) fn read_touched(self, at: HostAddr, to: &mut [u8]) -> Result<(), Errno> {
        match self {
            Reading::Call => call(at, to),
            Reading::Loads => {
                load(at, to);
                Ok(())
            }
        }
    }
}

fn pointer(at: HostAddr) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(ByteLen(at.0).get())
}

/// Faults pages in for reading (`MADV_POPULATE_READ` of madvise(2)).
fn populate(at: HostAddr, len: usize) -> Result<(), Errno> {
    let start = NonNull::new(pointer(at)).ok_or(Errno::EFAULT)?;
    loop {
        // SAFETY: it changes no content.
        match unsafe { madvise(start, len, MmapAdvise::MADV_POPULATE_READ) } {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            done => return done,
        }
    }
}

fn load(at: HostAddr, to: &mut [u8]) {
    // SAFETY: a range of a region, which its owner promised to keep mapped and readable; `to` is our own memory, and
    // no Rust reference to the guest's memory exists.
    unsafe { std::ptr::copy_nonoverlapping(pointer(at).cast_const().cast(), to.as_mut_ptr(), to.len()) };
}

fn call(at: HostAddr, to: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < to.len() {
        let remote = [RemoteIoVec { base: ByteLen(at.0).get() + done, len: to.len() - done }];
        match process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut to[done..])], &remote) {
            Ok(0) => return Err(Errno::EFAULT),
            Ok(bytes) => done += bytes,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Faults pages in for writing (`MADV_POPULATE_WRITE`): where none is left, an error instead of a SIGBUS.
///
/// # Errors
/// If there is no page (of huge pages: the pool or a cgroup's limit).
pub(crate) fn populate_for_writing(at: HostAddr, len: ByteLen) -> io::Result<()> {
    let start = NonNull::new(pointer(at)).ok_or(Errno::EFAULT)?;
    loop {
        // SAFETY: it makes pages that are missing, which read as zero as they did before; the content of others stays.
        match unsafe { madvise(start, len.get(), MmapAdvise::MADV_POPULATE_WRITE) } {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            // Before Linux 5.14.
            Err(Errno::EINVAL) => return Ok(()),
            done => return Ok(done?),
        }
    }
}
