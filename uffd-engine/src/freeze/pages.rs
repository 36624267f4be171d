//! Which granules are saved, and which granules exist at all.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use page_source::{HostAddr, PAGE_SHIFT};

use crate::sys::memory::Table;
use crate::sys::scan::first_present;

const UNSAVED: u8 = 0;
const CLAIMED: u8 = 1;
const SAVED: u8 = 2;
/// It did not exist, its first toucher has an ordinary page, and the sink has not heard of it.
const HOLE: u8 = 3;

/// For each granule: not saved, being copied, or saved.
#[derive(Debug)]
pub(crate) struct Saved(Table);

impl Saved {
    pub(crate) fn new(granules: usize) -> io::Result<Saved> {
        Ok(Saved(Table::new(granules)?))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether somebody is copying it just now.
    pub(crate) fn claimed(&self, granule: usize) -> bool {
        self.0[granule].load(Ordering::Acquire) == CLAIMED
    }

    /// Whether the sink has it, or will have it from the pool.
    pub(crate) fn saved(&self, granule: usize) -> bool {
        self.0[granule].load(Ordering::Acquire) == SAVED
    }

    /// Whether its content at the freeze point is known, so that it may change.
    pub(crate) fn may_change(&self, granule: usize) -> bool {
        matches!(self.0[granule].load(Ordering::Acquire), SAVED | HOLE)
    }

    /// The caller is the one who saves it.
    pub(crate) fn claim(&self, granule: usize) -> bool {
        self.0[granule].compare_exchange(UNSAVED, CLAIMED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// A claimed granule is saved.
    pub(crate) fn done(&self, granule: usize) {
        self.0[granule].store(SAVED, Ordering::Release);
    }

    /// A claimed granule did not exist.
    pub(crate) fn hole(&self, granule: usize) {
        self.0[granule].store(HOLE, Ordering::Release);
    }

    /// A hole that was touched; the caller tells the sink.
    pub(crate) fn take_hole(&self, granule: usize) -> bool {
        self.0[granule].compare_exchange(HOLE, SAVED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// A claimed granule could not be saved now.
    pub(crate) fn give_back(&self, granule: usize) {
        self.0[granule].store(UNSAVED, Ordering::Release);
    }
}

/// Present or swapped out: bits 63 and 62 of an entry of `/proc/self/pagemap`
/// (Linux Documentation/admin-guide/mm/pagemap.rst).
const EXISTS: u64 = 3 << 62;

/// This process's page table, as the kernel shows it.
#[derive(Debug)]
pub(crate) struct PageTable(File);

impl PageTable {
    pub(crate) fn open() -> io::Result<PageTable> {
        Ok(PageTable(File::open("/proc/self/pagemap")?))
    }

    /// The first page between two addresses that exists. `ENOTTY` from a kernel before Linux 6.7, which can't tell.
    pub(crate) fn first(&self, start: HostAddr, end: HostAddr) -> nix::Result<Option<HostAddr>> {
        first_present(&self.0, start, end)
    }

    /// For each of so many pages from `start` on: whether there is one.
    pub(crate) fn exist(&self, start: HostAddr, pages: usize) -> io::Result<Vec<bool>> {
        let mut entries = vec![0; 8 * pages];
        self.0.read_exact_at(&mut entries, (start.0 >> PAGE_SHIFT) * 8)?;
        // The kernel's own integers, in memory order: this never leaves the machine.
        let (words, _) = entries.as_chunks::<8>();
        Ok(words.iter().map(|&word| native(word) & EXISTS != 0).collect())
    }
}

#[expect(clippy::host_endian_bytes, reason = "a kernel interface in the byte order of the machine")]
fn native(word: [u8; 8]) -> u64 {
    u64::from_ne_bytes(word)
}
