//! The content of pages on its way from a source to a sink.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use page_units::{ByteLen, FileOffset};

use crate::sys;

/// Bytes that a source lends to a sink for the time of one call.
///
/// They are either ordinary memory, or a mapped file. Reading a mapped file with a plain load would kill the process
/// with `SIGBUS` if somebody truncates the file, so user code never does: the bytes go to the kernel by address
/// ([`as_kernel_ptr`](PageBytes::as_kernel_ptr), which answers `EFAULT` then), or through
/// [`copy_to`](PageBytes::copy_to), which uses `pread` on the file.
#[derive(Clone, Copy, Debug)]
pub struct PageBytes<'a> {
    start: *const u8,
    len: usize,
    file: Option<(&'a File, FileOffset)>,
    lent: PhantomData<&'a [u8]>,
}

impl<'a> PageBytes<'a> {
    /// Bytes in ordinary memory.
    #[must_use]
    pub fn from_slice(bytes: &'a [u8]) -> PageBytes<'a> {
        PageBytes { start: bytes.as_ptr(), len: bytes.len(), file: None, lent: PhantomData }
    }

    /// `len` bytes of a mapped file: `start` is where the byte at `offset` of `file` is mapped.
    ///
    /// The memory is only ever handed to the kernel, so the call is safe even if `start` is wrong; the sink then gets
    /// an error, or bytes that are not the file's.
    #[must_use]
    pub fn from_mapped_file(start: *const u8, len: ByteLen, file: &'a File, offset: FileOffset) -> PageBytes<'a> {
        PageBytes { start, len: len.get(), file: Some((file, offset)), lent: PhantomData }
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> ByteLen {
        ByteLen::of(self.len)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address of the bytes, to be handed to a system call and to nothing else. A call that finds them gone
    /// answers `EFAULT`.
    #[must_use]
    pub fn as_kernel_ptr(&self) -> *const u8 {
        self.start
    }

    /// The bytes, if they are ordinary memory.
    #[must_use]
    pub fn as_slice(&self) -> Option<&'a [u8]> {
        match self.file {
            Some(_) => None,
            None => Some(sys::lent_slice(self)),
        }
    }

    /// `len` of the bytes, from `from` on.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn slice(&self, from: ByteLen, len: ByteLen) -> PageBytes<'a> {
        let (from, len) = (from.get(), len.get());
        assert!(from <= self.len && len <= self.len - from, "bytes {from}+{len} of {}", self.len);
        PageBytes {
            start: self.start.wrapping_add(from),
            len,
            file: self.file.map(|(file, offset)| (file, offset + ByteLen::of(from))),
            lent: PhantomData,
        }
    }

    /// Copies the bytes into `to`.
    ///
    /// # Errors
    /// If they come from a file that can't be read, or is now too short.
    ///
    /// # Panics
    /// If `to` is not exactly as long.
    pub fn copy_to(&self, to: &mut [u8]) -> io::Result<()> {
        assert_eq!(to.len(), self.len, "a buffer of another length");
        match self.file {
            Some((file, offset)) => file.read_exact_at(to, offset.0),
            None => {
                to.copy_from_slice(sys::lent_slice(self));
                Ok(())
            }
        }
    }

    /// Writes all of the bytes to a file at `offset`, without bringing them through user code.
    ///
    /// # Errors
    /// If the file can't be written, or the bytes (of a mapped file) are gone: `EFAULT`.
    pub fn write_to(&self, file: impl AsFd, offset: FileOffset) -> io::Result<()> {
        let file: BorrowedFd<'_> = file.as_fd();
        sys::pwrite_all(file, self, offset)
    }

    /// Brings the bytes into memory, if they are of a mapped file whose pages may lie on a disk: for a sink that is about
    /// to take a lock, or whose reader must not wait meanwhile. Does nothing for ordinary memory.
    ///
    /// A hint (`MADV_POPULATE_READ`, madvise(2); Linux before 5.14 does not know it): what is wrong with the file is said
    /// by the call that takes the bytes.
    pub fn bring(&self) {
        if self.file.is_some() {
            sys::populate(self);
        }
    }

    pub(crate) fn ordinary(&self) -> bool {
        self.file.is_none()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn mapped_bytes_are_read_through_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let bytes = PageBytes::from_mapped_file(std::ptr::null(), ByteLen(8), &file, FileOffset(1));
        assert!(bytes.as_slice().is_none());
        let mut three = [0; 3];
        bytes.slice(ByteLen(4), ByteLen(3)).copy_to(&mut three).unwrap();
        assert_eq!(&three, b"567");
        file.set_len(6).unwrap();
        assert!(bytes.slice(ByteLen(4), ByteLen(3)).copy_to(&mut three).is_err());
    }

    #[test]
    fn a_vanished_mapping_is_an_error_and_not_a_signal() {
        let out = tempfile::tempfile().unwrap();
        let file = tempfile::tempfile().unwrap();
        let nowhere = PageBytes::from_mapped_file(std::ptr::null(), ByteLen(8), &file, FileOffset(0));
        nowhere.bring();
        let error = nowhere.write_to(&out, FileOffset(0)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        PageBytes::from_slice(b"abc").write_to(&out, FileOffset(2)).unwrap();
        let mut back = [0; 3];
        out.read_exact_at(&mut back, 2).unwrap();
        assert_eq!(&back, b"abc");
    }
}
