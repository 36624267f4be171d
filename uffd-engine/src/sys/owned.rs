//! Memory that is owned, and copied from and to.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munlock, munmap};
use page_units::{ByteLen, HostAddr};

use super::memory::{give_back, resident};

/// A mapping of this process, unmapped when it is dropped. No reference into it ever exists.
#[derive(Debug)]
pub(crate) struct Map {
    start: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

// SAFETY: memory that is owned; no reference to it exists, it is only copied from and to.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

const PROTECTION: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Map {
    /// Private anonymous memory, of which nothing is there, also in a process that locks all its memory (mlockall(2)), in
    /// which a new mapping is populated.
    pub(crate) fn anonymous(len: ByteLen) -> io::Result<Map> {
        let len = size(len)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choosing.
        let start = unsafe { mmap_anonymous(None, len, PROTECTION, flags) }?;
        let map = Map { start, len };
        if resident(map.addr()) {
            // SAFETY: the mapping is ours; what is not locked stays as it is.
            unsafe { munlock(map.start, len.get()) }?;
            give_back(map.addr(), map.len(), false)?;
        }
        Ok(map)
    }

    /// A file, shared, from its beginning.
    pub(crate) fn shared(file: &File, len: ByteLen) -> io::Result<Map> {
        let len = size(len)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choosing.
        let start = unsafe { mmap(None, len, PROTECTION, flags, file, 0) }?;
        Ok(Map { start, len })
    }

    pub(crate) fn addr(&self) -> HostAddr {
        HostAddr(self.start.addr().get() as u64)
    }

    pub(crate) fn len(&self) -> ByteLen {
        ByteLen::of(self.len.get())
    }

    /// Copies from it.
    ///
    /// # Panics
    /// If that is not inside.
    pub(crate) fn read(&self, at: ByteLen, to: &mut [u8]) {
        let from = self.inside(at, to.len());
        // SAFETY: `from` and the bytes after it are inside the mapping, which lives as long as `self`, and `to` is other
        // memory. A concurrent writer could only make the copy a mixture.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Copies into it.
    ///
    /// # Panics
    /// If that is not inside.
    pub(crate) fn write(&self, at: ByteLen, from: &[u8]) {
        let to = self.inside(at, from.len());
        // SAFETY: as above, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    fn inside(&self, at: ByteLen, len: usize) -> *mut u8 {
        assert!(at.get().checked_add(len).is_some_and(|end| end <= self.len.get()), "outside the mapping");
        self.start.as_ptr().cast::<u8>().wrapping_add(at.get())
    }
}

fn size(len: ByteLen) -> io::Result<NonZeroUsize> {
    NonZeroUsize::new(len.get()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        if let Err(error) = unsafe { munmap(self.start, self.len.get()) } {
            log::warn!("unmapping memory failed: {error}");
        }
    }
}
