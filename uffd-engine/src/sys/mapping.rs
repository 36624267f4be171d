//! A second mapping of a file that memory is made of.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use page_units::{ByteLen, FileOffset, HostAddr};

/// A shared, read-only mapping, unmapped when dropped. Nobody reads through it: only its page table is of use.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

// SAFETY: an address range that is owned; nothing is read or written through it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes of `file` from `offset` on. It takes no memory, and reserves none.
    pub(crate) fn new(file: &File, offset: FileOffset, len: ByteLen) -> io::Result<Mapping> {
        let len = NonZeroUsize::new(len.get()).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset.0).map_err(io::Error::other)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choosing.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, file, offset) }?;
        Ok(Mapping { start, len })
    }

    pub(crate) fn addr(&self) -> HostAddr {
        HostAddr(self.start.as_ptr() as u64)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it.
        if let Err(error) = unsafe { munmap(self.start, self.len.get()) } {
            log::warn!("unmapping a file failed: {error}");
        }
    }
}
