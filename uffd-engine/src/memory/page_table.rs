//! Which pages exist at all.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, PAGE_SHIFT, PAGE_SIZE};

use crate::sys::scan::{Found, PRESENT, SWAPPED, scan};

/// Bits of an entry of `/proc/self/pagemap` (Linux Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
/// How many entries are read at a time.
const ENTRIES: u64 = 8192;
/// How many ranges are asked for at a time.
const RANGES: usize = 256;

/// This process's page table, as the kernel shows it. Nothing is touched to look something up: touching a page would
/// make it exist.
#[derive(Debug)]
pub(crate) struct PageTable(File);

/// What to look for.
#[derive(Clone, Copy)]
enum Wanted {
    Mapped,
    Existing,
}

impl Wanted {
    fn categories(self) -> u64 {
        match self {
            Wanted::Mapped => PRESENT,
            Wanted::Existing => PRESENT | SWAPPED,
        }
    }

    fn has(self, entry: u64) -> bool {
        let bits = match self {
            Wanted::Mapped => ENTRY_PRESENT,
            Wanted::Existing => ENTRY_PRESENT | ENTRY_SWAPPED,
        };
        entry & bits != 0
    }
}

impl PageTable {
    /// Opens `/proc/self/pagemap`.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn open() -> io::Result<PageTable> {
        Ok(PageTable(File::open("/proc/self/pagemap")?))
    }

    /// Where there are pages in `length` bytes from `start` on, be they in memory or swapped out: all content of private
    /// memory. In order, and apart from each other.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub(crate) fn existing(&self, start: HostAddr, length: ByteLen) -> io::Result<Vec<Range<HostAddr>>> {
        self.ranges(start, length, Wanted::Existing)
    }

    /// As [`existing`](PageTable::existing), but only pages that are mapped at this moment. What shared memory holds
    /// besides, its file knows.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub(crate) fn mapped(&self, start: HostAddr, length: ByteLen) -> io::Result<Vec<Range<HostAddr>>> {
        self.ranges(start, length, Wanted::Mapped)
    }

    fn ranges(&self, start: HostAddr, length: ByteLen, wanted: Wanted) -> io::Result<Vec<Range<HostAddr>>> {
        let end = start.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        match self.scanned(start, end, wanted) {
            Ok(ranges) => Ok(ranges),
            // Before Linux 6.7.
            Err(Errno::ENOTTY) => self.read(start, end, wanted),
            Err(errno) => Err(errno.into()),
        }
    }

    fn scanned(&self, mut at: HostAddr, end: HostAddr, wanted: Wanted) -> nix::Result<Vec<Range<HostAddr>>> {
        let mut ranges = Vec::new();
        let mut found = [const { Found::NOTHING }; RANGES];
        while at < end {
            let (some, next) = scan(&self.0, at, end, wanted.categories(), &mut found, 0)?;
            some.iter().for_each(|found| add(&mut ranges, found.range()));
            if next <= at {
                return Err(Errno::EIO);
            }
            at = next;
        }
        Ok(ranges)
    }

    fn read(&self, mut at: HostAddr, end: HostAddr, wanted: Wanted) -> io::Result<Vec<Range<HostAddr>>> {
        let mut ranges = Vec::new();
        while at < end {
            let pages = ((end - at).0.div_ceil(PAGE_SIZE)).min(ENTRIES);
            for entry in self.entries(at, ByteLen(pages).get())? {
                let next = at + ByteLen(PAGE_SIZE);
                if wanted.has(entry) {
                    add(&mut ranges, at..next);
                }
                at = next;
            }
        }
        Ok(ranges)
    }

    /// The first page between two addresses that exists. `ENOTTY` from a kernel before Linux 6.7, which can't tell.
    pub(crate) fn first(&self, start: HostAddr, end: HostAddr) -> nix::Result<Option<HostAddr>> {
        let mut found = [Found::NOTHING];
        let (some, _) = scan(&self.0, start, end, Wanted::Existing.categories(), &mut found, 1)?;
        Ok(some.first().map(|found| found.range().start))
    }

    /// Whether there is a page, for each of `pages` from `start` on.
    pub(crate) fn exist(&self, start: HostAddr, pages: usize) -> io::Result<Vec<bool>> {
        Ok(self.entries(start, pages)?.map(|entry| Wanted::Existing.has(entry)).collect())
    }

    /// Whether there is a page at an address, as far as the kernel says. A page of huge pages is never swapped out; what
    /// looks like it is a marker (of write protection, or poison).
    pub(crate) fn has(&self, at: HostAddr, huge: bool) -> bool {
        let wanted = if huge { Wanted::Mapped } else { Wanted::Existing };
        self.entries(at, 1).is_ok_and(|mut entries| entries.next().is_some_and(|entry| wanted.has(entry)))
    }

    fn entries(&self, start: HostAddr, pages: usize) -> io::Result<impl Iterator<Item = u64> + use<>> {
        let mut entries = vec![0; 8 * pages];
        self.0.read_exact_at(&mut entries, (start.0 >> PAGE_SHIFT) * 8)?;
        Ok((0..pages).map(move |page| native(&entries[8 * page..8 * page + 8])))
    }
}

/// Adds a range behind the others, or to the last one.
fn add(ranges: &mut Vec<Range<HostAddr>>, range: Range<HostAddr>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// The kernel's own integers, in memory order: this never leaves the machine.
#[expect(clippy::host_endian_bytes, reason = "a kernel interface in the byte order of the machine")]
fn native(word: &[u8]) -> u64 {
    u64::from_ne_bytes(word.try_into().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

    use super::*;

    const PAGE: u64 = PAGE_SIZE;

    #[test]
    fn what_was_touched_exists() {
        // Many more ranges than are asked for at a time, and more pages than are read at a time.
        let pages = 3 * ENTRIES;
        // Of a file, since private memory may have huge pages by itself.
        let file = File::from(memfd_create("touched", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        let memory = MmapRegion::<()>::from_file(FileOffset::new(file, 0), ByteLen(pages * PAGE).get()).unwrap();
        let touched = |page: u64| page % 7 == 3 || (2000..9000).contains(&page);
        for page in (0..pages).filter(|&page| touched(page)) {
            memory.as_volatile_slice().write_slice(&[1], ByteLen(page * PAGE).get()).unwrap();
        }
        let start = HostAddr(memory.as_ptr().addr() as u64);
        let mut expected = Vec::new();
        for page in (0..pages).filter(|&page| touched(page)) {
            let at = start + ByteLen(page * PAGE);
            add(&mut expected, at..at + ByteLen(PAGE));
        }
        assert!(expected.len() > 2 * RANGES);
        let table = PageTable::open().unwrap();
        let all = ByteLen(pages * PAGE);
        assert_eq!(table.existing(start, all).unwrap(), expected);
        assert_eq!(table.mapped(start, all).unwrap(), expected);
        // As on an older kernel.
        let end = start + all;
        assert_eq!(table.read(start, end, Wanted::Existing).unwrap(), expected);
        let first = table.first(start, end);
        let older = testkit::require::kernel_version() < (6, 7);
        assert!(first == Ok(Some(expected[0].start)) || (older && first == Err(Errno::ENOTTY)), "{first:?}");
        assert!((0..pages).map(touched).eq(table.exist(start, ByteLen(pages).get()).unwrap()));
        let from = start + ByteLen(4 * PAGE);
        assert_eq!(table.existing(from, ByteLen(6 * PAGE)).unwrap(), []);
        assert_eq!(table.existing(from, ByteLen(7 * PAGE)).unwrap(), [expected[1].clone()]);
        assert!(table.existing(HostAddr(u64::MAX), ByteLen(PAGE)).is_err());
    }
}
