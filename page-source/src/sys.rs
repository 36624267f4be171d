//! The unsafe part: lending memory, and handing addresses to the kernel.
#![expect(unsafe_code, reason = "raw addresses go to the kernel, which checks them")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use page_units::FileOffset;

use crate::PageBytes;

// SAFETY: the pointer inside is either that of a `&[u8]`, which is Send and Sync, or only ever handed to the kernel.
unsafe impl Send for PageBytes<'_> {}
// SAFETY: as above; nothing is ever written through it.
unsafe impl Sync for PageBytes<'_> {}

/// The slice from which `bytes` was made. The caller has checked that it was made from one.
pub(crate) fn lent_slice<'a>(bytes: &PageBytes<'a>) -> &'a [u8] {
    assert!(bytes.ordinary(), "a mapped file is not read by user code");
    // SAFETY: `ordinary` says that pointer and length are (a part of) a `&'a [u8]`.
    unsafe { std::slice::from_raw_parts(bytes.as_kernel_ptr(), bytes.len().get()) }
}

/// Lets the kernel bring the pages of a mapping into memory.
pub(crate) fn populate(bytes: &PageBytes<'_>) {
    const ALIGNMENT: usize = 4096;
    let start = bytes.as_kernel_ptr();
    let before = start.addr() % ALIGNMENT;
    let (from, length) = (start.wrapping_sub(before), bytes.len().get() + before);
    // SAFETY: the advice changes neither what is mapped nor its content, and the kernel checks the range.
    let _ = unsafe { libc::madvise(from.cast_mut().cast(), length, libc::MADV_POPULATE_READ) };
}

/// `pwrite` until all is written.
pub(crate) fn pwrite_all(file: BorrowedFd<'_>, bytes: &PageBytes<'_>, offset: FileOffset) -> io::Result<()> {
    let mut done = 0;
    let len = bytes.len().get();
    while done < len {
        let at = i64::try_from(offset.0 + done as u64).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let from = bytes.as_kernel_ptr().wrapping_add(done);
        // SAFETY: the kernel checks the address and answers EFAULT if nothing is there; it only reads.
        let n = unsafe { libc::pwrite(file.as_raw_fd(), from.cast(), len - done, at) };
        match usize::try_from(n) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => done += n,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
