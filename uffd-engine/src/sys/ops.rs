//! One function per ioctl on guest memory. None of them is unsafe to call: the kernel checks every address, and the
//! memory they change is memory that its owner registered for exactly that.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use page_units::PAGE_SIZE;

use super::abi::{self, Copy, Fill, Message, Range, WriteProtect};

/// The bytes of a huge page.
const HUGE: u64 = page_units::PageSize::HUGE.bytes().0;

/// What an install did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// All of it.
    All,
    /// The first bytes, this many; try again with the rest.
    Part(u64),
    /// Nothing, and why.
    Failed(Errno),
}

/// The outcome of an ioctl whose out-field says (signed!) how many bytes were done.
fn done(status: i32, out: i64, len: u64) -> Done {
    if status == 0 {
        return Done::All;
    }
    let errno = Errno::last();
    match u64::try_from(out) {
        Ok(0) => Done::Failed(errno),
        Ok(bytes) if bytes < len => Done::Part(bytes),
        Ok(_) => Done::All,
        Err(_) => Done::Failed(errno),
    }
}

/// `UFFDIO_COPY`. `from` is read by the kernel only: an address that is gone is `EFAULT`. Write-protected from the
/// first moment on, if `protect`.
pub(crate) fn copy(fd: BorrowedFd<'_>, to: u64, from: *const u8, len: u64, protect: bool) -> Done {
    let mode = if protect { abi::UFFDIO_COPY_MODE_WP } else { 0 };
    let mut arg = Copy { dst: to, src: from as u64, len, mode, copy: 0 };
    // SAFETY: `arg` is the structure this ioctl reads and writes; the addresses in it are checked by the kernel.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), abi::UFFDIO_COPY, &raw mut arg) };
    done(status, arg.copy, len)
}

/// Whether a range lies in one mapping that is registered. Asked by a `UFFDIO_COPY` of bytes that no process has, which
/// changes nothing: it is `ENOENT` where there is no such mapping, and `EFAULT` or `EEXIST` where there is.
pub(crate) fn is_registered(fd: BorrowedFd<'_>, start: u64, len: u64) -> bool {
    /// The first address of the kernel's half.
    const NOWHERE: usize = 1 << 63;
    copy(fd, start, std::ptr::without_provenance(NOWHERE), len, false) != Done::Failed(Errno::ENOENT)
}

fn fill(fd: BorrowedFd<'_>, number: u64, start: u64, len: u64, mode: u64) -> Done {
    let mut arg = Fill { range: Range { start, len }, mode, done: 0 };
    // SAFETY: `arg` is the structure that all three ioctls read and write; the kernel checks the range in it.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut arg) };
    done(status, arg.done, len)
}

/// `UFFDIO_ZEROPAGE`: not on hugetlbfs.
pub(crate) fn zeropage(fd: BorrowedFd<'_>, start: u64, len: u64) -> Done {
    fill(fd, abi::UFFDIO_ZEROPAGE, start, len, 0)
}

/// `UFFDIO_CONTINUE`: maps pages that the file behind shared memory holds already; write-protected, if `protect`.
pub(crate) fn map_cached(fd: BorrowedFd<'_>, start: u64, len: u64, protect: bool) -> Done {
    let mode = if protect { abi::UFFDIO_CONTINUE_MODE_WP } else { 0 };
    fill(fd, abi::UFFDIO_CONTINUE, start, len, mode)
}

/// `UFFDIO_POISON`: any access is an error from now on, also after the descriptor was closed.
pub(crate) fn poison(fd: BorrowedFd<'_>, start: u64, len: u64) -> Done {
    fill(fd, abi::UFFDIO_POISON, start, len, 0)
}

/// `UFFDIO_WRITEPROTECT`: arms what is populated of a range, or releases it and wakes its writers.
///
/// Before Linux 6.3 one call is for one mapping, and `ENOENT` for several: there it is done in parts.
pub(crate) fn write_protect(fd: BorrowedFd<'_>, start: u64, len: u64, armed: bool) -> Result<(), Errno> {
    match write_protect_once(fd, start, len, armed) {
        Err(Errno::ENOENT) => {}
        done => return done,
    }
    // The middle, between two huge pages if there is such a place.
    let inside = |at: &u64| (start + 1..start + len).contains(at);
    let middle = |unit| Some((start + len / 2).next_multiple_of(unit)).filter(inside);
    let Some(middle) = middle(HUGE).or_else(|| middle(PAGE_SIZE)) else { return Err(Errno::ENOENT) };
    // A part of a huge page is refused as such: it is not registered, as the whole is not.
    let part = |start, len| match write_protect(fd, start, len, armed) {
        Err(Errno::EINVAL) => Err(Errno::ENOENT),
        done => done,
    };
    part(start, middle - start)?;
    part(middle, start + len - middle)
}

fn write_protect_once(fd: BorrowedFd<'_>, start: u64, len: u64, armed: bool) -> Result<(), Errno> {
    let mode = if armed { abi::UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
    let mut arg = WriteProtect { range: Range { start, len }, mode };
    // SAFETY: `arg` is the structure this ioctl reads; the kernel checks the range in it.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), abi::UFFDIO_WRITEPROTECT, &raw mut arg) };
    if status < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Reads as many messages as are there and fit.
pub(crate) fn read(fd: BorrowedFd<'_>, messages: &mut [Message]) -> Result<usize, Errno> {
    let bytes = size_of_val(messages);
    // SAFETY: the kernel writes at most `bytes` bytes of plain integers into the slice.
    let n = unsafe { libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), bytes) };
    match usize::try_from(n) {
        Ok(n) => Ok(n / size_of::<Message>()),
        Err(_) => Err(Errno::last()),
    }
}
