//! Raw memory: tables that cost nothing until they are used, scratch pages, discards.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munlock, munmap};
use page_units::{ByteLen, HostAddr};

/// A table of atomic bytes, all zero at first, that costs nothing where it was never touched.
///
/// A mapping of its own: memory of the allocator may have been used before, and is then cleared, which for a table of
/// 16 GiB of guest memory takes longer than everything else of a start.
#[derive(Debug)]
pub(crate) struct Table {
    memory: Scratch,
    len: usize,
}

impl Table {
    pub(crate) fn new(len: usize) -> io::Result<Table> {
        Ok(Table { memory: Scratch::new(ByteLen::of(len.max(1)))?, len })
    }
}

impl Deref for Table {
    type Target = [AtomicU8];

    fn deref(&self) -> &[AtomicU8] {
        let start: *const AtomicU8 = self.memory.as_ptr().cast();
        // SAFETY: `len` bytes of our own mapping, which lives as long as `self`; `AtomicU8` has the size, alignment and
        // bit validity of `u8`, and nobody has another reference to them.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

/// Private anonymous memory of this process, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    start: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

// SAFETY: it is memory, owned; only addresses are handed out.
unsafe impl Send for Scratch {}
// SAFETY: as above.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// `len` bytes (rounded up to a page by the kernel), never touched here: reading gives zeros.
    pub(crate) fn new(len: ByteLen) -> io::Result<Scratch> {
        let len = NonZeroUsize::new(len.get()).ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choosing.
        let start = unsafe { mmap_anonymous(None, len, protection, flags) }?;
        Ok(Scratch { start, len })
    }

    /// The same for memory that is to be registered: nothing of it is there, also in a process that locks all its memory
    /// (mlockall(2)), in which a new mapping is populated.
    pub(crate) fn missing(len: ByteLen) -> io::Result<Scratch> {
        let scratch = Scratch::new(len)?;
        if resident(scratch.addr()) {
            scratch.empty()?;
        }
        Ok(scratch)
    }

    /// Gives all of it back, also if the process has locked it. It must not be registered: that would be a discard.
    pub(crate) fn empty(&self) -> io::Result<()> {
        // SAFETY: the mapping is ours; what is not locked stays as it is.
        unsafe { munlock(self.start, self.len.get()) }?;
        give_back(self.addr(), ByteLen::of(self.len.get()), false)
    }

    pub(crate) fn addr(&self) -> HostAddr {
        HostAddr(self.start.as_ptr() as u64)
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.start.as_ptr().cast()
    }

    /// Reads the byte at `at`: a page fault if its page is missing.
    ///
    /// # Panics
    /// If it is not inside.
    pub(crate) fn touch(&self, at: ByteLen) -> u8 {
        assert!(at.get() < self.len.get(), "outside the scratch memory");
        let byte = self.as_ptr().wrapping_add(at.get());
        // SAFETY: inside the mapping (just checked), readable for as long as `self` lives.
        unsafe { byte.read_volatile() }
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping, which `self` owns and lends; writers need `&mut self`.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len.get()) }
    }

    /// `len` bytes from `at` on, for one writer.
    ///
    /// # Panics
    /// If they are not inside.
    pub(crate) fn bytes_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        assert!(at <= self.len.get() && len <= self.len.get() - at, "outside the scratch memory");
        let from = self.start.as_ptr().cast::<u8>().wrapping_add(at);
        // SAFETY: inside the mapping (just checked), which `self` owns and lends mutably.
        unsafe { std::slice::from_raw_parts_mut(from, len) }
    }
}

impl Scratch {
    /// Asks for huge pages, which are had faster; whether there are any does not matter.
    pub(crate) fn prefer_huge(&mut self) {
        // SAFETY: the mapping is ours; this changes by what pages it is backed, and not what it holds.
        if let Err(error) = unsafe { madvise(self.start, self.len.get(), MmapAdvise::MADV_HUGEPAGE) } {
            log::debug!("no huge pages for scratch memory: {error}");
        }
    }

    /// As many whole pieces as there are in it.
    ///
    /// # Panics
    /// If a piece is to have no bytes.
    pub(crate) fn split(self, len: usize) -> Vec<Piece> {
        let count = self.len.get() / len;
        let whole = Arc::new(self);
        (0..count).map(|number| Piece { whole: Arc::clone(&whole), at: number * len, len }).collect()
    }
}

/// A part of scratch memory that nobody else has.
#[derive(Debug)]
pub(crate) struct Piece {
    whole: Arc<Scratch>,
    at: usize,
    len: usize,
}

impl Piece {
    pub(crate) fn bytes(&self) -> &[u8] {
        let from = self.whole.as_ptr().wrapping_add(self.at);
        // SAFETY: inside the mapping (`split` made it so), which `whole` keeps; it is written to through this piece
        // alone, and only with `&mut self`.
        unsafe { std::slice::from_raw_parts(from, self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        let from = self.whole.start.as_ptr().cast::<u8>().wrapping_add(self.at);
        // SAFETY: as above; `split` gave up the scratch memory itself, and pieces do not overlap.
        unsafe { std::slice::from_raw_parts_mut(from, self.len) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it any more.
        if let Err(error) = unsafe { munmap(self.start, self.len.get()) } {
            log::warn!("unmapping scratch memory failed: {error}");
        }
    }
}

/// Whether the page at that address, of this process, is in memory: mincore(2). What can't be told is not.
pub(crate) fn resident(page: HostAddr) -> bool {
    let mut is = 0;
    // SAFETY: it reads the page table, and writes one byte, for one page.
    let status = unsafe { libc::mincore(std::ptr::without_provenance_mut(len_of(page)), 1, &raw mut is) };
    status == 0 && is & 1 != 0
}

/// Gives a range of this process back: `MADV_DONTNEED` drops private pages, `MADV_REMOVE` punches the file behind
/// shared ones.
pub(crate) fn give_back(start: HostAddr, len: ByteLen, shared: bool) -> io::Result<()> {
    let advice = if shared { MmapAdvise::MADV_REMOVE } else { MmapAdvise::MADV_DONTNEED };
    let at = std::ptr::with_exposed_provenance_mut(len_of(start));
    let Some(at) = NonNull::new(at) else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: the range lies in a region that its owner registered, promising that the engine may discard there.
    unsafe { madvise(at, len.get(), advice) }?;
    Ok(())
}

/// Takes all rights to a range of this process: any access to it is an error from now on, of whatever holds it now.
pub(crate) fn refuse_access(start: HostAddr, len: ByteLen) -> nix::Result<()> {
    let at = std::ptr::with_exposed_provenance_mut(len_of(start));
    let Some(at) = NonNull::new(at) else { return Err(nix::errno::Errno::EINVAL) };
    // SAFETY: the range lies in a region that its owner registered, and holds nothing: what would read or write there
    // waits for content, and gets an error in its place.
    unsafe { mprotect(at, len.get(), ProtFlags::PROT_NONE) }
}

/// Copies into the unregistered alias of a granule that nobody can see yet.
///
/// # Errors
/// If the bytes (of a mapped file) can't be read.
pub(crate) fn write_alias(at: HostAddr, bytes: &page_source::PageBytes<'_>) -> io::Result<()> {
    let len = bytes.len().get();
    let at: *mut u8 = std::ptr::with_exposed_provenance_mut(len_of(at));
    // SAFETY: the owner of the region promised (see `Region::with_alias`) that the alias is writable memory of the
    // region's length, and the granule is in filling, so that nobody else reads or writes it.
    let to = unsafe { std::slice::from_raw_parts_mut(at, len) };
    bytes.copy_to(to)
}

fn len_of(addr: HostAddr) -> usize {
    ByteLen(addr.0).get()
}
