//! The unsafe part: mapping a file.
#![expect(unsafe_code, reason = "a mapping of a file is a raw address, which goes to the kernel only")]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use page_units::FileOffset;

/// A read-only, shared mapping of the start of a file. It gives out addresses, never references: what is behind them
/// may vanish when somebody truncates the file, and only the kernel copes with that.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Nothing is mapped of an empty file.
    start: Option<(NonNull<c_void>, NonZeroUsize)>,
}

// SAFETY: an address range of this process, the same from every thread, never read or written here.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `file`. A page fault in it reads one page, and nothing ahead.
    pub(crate) fn of_file(file: &File, length: usize) -> io::Result<Mapping> {
        let Some(length) = NonZeroUsize::new(length) else {
            return Ok(Mapping { start: None });
        };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address, so that nothing is mapped over.
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ, flags, file, 0) }?;
        let mapping = Mapping { start: Some((start, length)) };
        // SAFETY: the range was just mapped; the advice changes how it is filled and not what it holds.
        unsafe { madvise(start, length.get(), MmapAdvise::MADV_RANDOM) }?;
        Ok(mapping)
    }

    /// Where the byte at `offset` of the file is. Only an address: of nothing, if the mapping is shorter.
    pub(crate) fn address_of(&self, offset: FileOffset) -> *const u8 {
        let offset = usize::try_from(offset.0).unwrap_or(usize::MAX);
        match self.start {
            Some((start, length)) if offset < length.get() => {
                start.as_ptr().cast::<u8>().cast_const().wrapping_add(offset)
            }
            _ => std::ptr::null(),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some((start, length)) = self.start {
            // SAFETY: it was mapped by `of_file` and is not used after this; what was lent of it has ended, since the
            // lender borrows it.
            if let Err(error) = unsafe { munmap(start, length.get()) } {
                log::warn!("unmapping a file failed: {error}");
            }
        }
    }
}
