//! Which pages of guest memory exist at all. The others are zero, and are not touched to find that out: touching them
//! would make them exist.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_units::{FileOffset, HostAddr, PAGE_SHIFT, PageCount, PageRun};
use uffd_engine::{Backing, HugeFile, PageTable};

use crate::ram::{GuestRam, Piece};

/// Finds the pages of guest memory that may be other than zero.
#[derive(Debug)]
pub(crate) struct Existing<'a> {
    ram: &'a GuestRam,
    huge: Vec<HugePiece<'a>>,
}

impl Existing<'_> {
    pub(crate) fn new(ram: &GuestRam) -> io::Result<Existing<'_>> {
        let pieces = ram.pieces().iter().enumerate();
        let huge = pieces.filter_map(|(number, piece)| HugePiece::of(ram, number, piece)).collect::<io::Result<_>>()?;
        Ok(Existing { ram, huge })
    }

    /// Makes now what may be needed when the guest stands still.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        self.huge.iter().try_for_each(|huge| huge.asked().map(drop))
    }

    /// By piece.
    pub(crate) fn pages(&self) -> io::Result<Vec<Vec<PageRun>>> {
        self.look_up(|_| true, in_file)
    }

    /// Of shared memory alone, by piece.
    pub(crate) fn shared_pages(&self) -> io::Result<Vec<Vec<PageRun>>> {
        self.look_up(|piece| piece.shared, in_file)
    }

    /// The same where it takes little time, whatever there is: of small pages, all those that have a page table in common
    /// with one that exists. [`refine`](Existing::refine) makes it exact.
    ///
    /// To write-protect the holes among them is harmless, and much faster than to leave them out. Harmless: where there is
    /// no page the kernel leaves a marker in the page table (`PTE_MARKER_UFFD_WP`, Linux include/linux/swapops.h), which
    /// allocates no page, and whoever touches the hole is a missing fault as he is elsewhere. Faster: 1 GiB of which every
    /// second page exists is 65000 runs; to look them up takes 30 ms and to protect each by itself 45, together seven times
    /// what it takes to protect all at once.
    pub(crate) fn shared_page_tables(&self) -> io::Result<Vec<Vec<PageRun>>> {
        self.look_up(|piece| piece.shared, page_tables_in_file)
    }

    /// Leaves what exists now.
    pub(crate) fn refine(&self, by_piece: &mut [Vec<PageRun>]) -> io::Result<()> {
        for ((number, piece), pages) in self.ram.pieces().iter().enumerate().zip(by_piece) {
            if let Some((file, offset)) = self.ram.file_of(number).filter(|_| is_memfd(piece)) {
                *pages = in_file(piece, file, offset)?;
            }
        }
        Ok(())
    }

    fn look_up(
        &self,
        wanted: impl Fn(&Piece) -> bool,
        in_memfd: fn(&Piece, &File, u64) -> io::Result<Vec<PageRun>>,
    ) -> io::Result<Vec<Vec<PageRun>>> {
        let pieces = self.ram.pieces().iter().enumerate();
        let of = |(number, piece): (usize, &Piece)| match self.ram.file_of(number) {
            _ if !wanted(piece) => Ok(Vec::new()),
            // What nobody has touched here is what the file holds, or another process has written.
            Some(_) if !piece.shared => Ok(vec![piece.run]),
            None if piece.shared => Ok(vec![piece.run]),
            Some((file, offset)) if is_memfd(piece) => in_memfd(piece, file, offset),
            _ => in_page_table(piece),
        };
        let mut pages = pieces.map(of).collect::<io::Result<Vec<_>>>()?;
        // Huge pages may have been filled elsewhere, by another process or through another mapping. Then the file has more
        // of them than are mapped here.
        for huge in &self.huge {
            let same = self.huge.iter().filter(|other| other.inode == huge.inode);
            let known: u64 = same.flat_map(|same| &pages[same.number]).map(|run| run.len().0).sum();
            if known != huge.file.metadata()?.blocks().saturating_mul(BLOCK) {
                pages[huge.number] = huge.look_up(&pages[huge.number])?;
            }
        }
        Ok(pages)
    }
}

/// The unit of `st_blocks` (stat(2)): that of a file on hugetlbfs counts its pages, and nothing else.
const BLOCK: u64 = 512;

/// A piece of shared memory of huge pages.
#[derive(Debug)]
struct HugePiece<'a> {
    number: usize,
    piece: &'a Piece,
    file: &'a File,
    offset: u64,
    inode: (u64, u64),
    asked: OnceLock<HugeFile>,
}

impl HugePiece<'_> {
    fn of<'a>(ram: &'a GuestRam, number: usize, piece: &'a Piece) -> Option<io::Result<HugePiece<'a>>> {
        let (file, offset) = ram.file_of(number).filter(|_| piece.shared && piece.backing == Backing::Hugetlb)?;
        let inode = file.metadata().map(|of| (of.dev(), of.ino()));
        Some(inode.map(|inode| HugePiece { number, piece, file, offset, inode, asked: OnceLock::new() }))
    }

    fn asked(&self) -> io::Result<&HugeFile> {
        if let Some(asked) = self.asked.get() {
            return Ok(asked);
        }
        let made = HugeFile::new(self.file, FileOffset(self.offset), self.piece.run.len())?;
        Ok(self.asked.get_or_init(|| made))
    }

    /// All pages that the file holds, of which some are known: about a microsecond for each of the others.
    fn look_up(&self, known: &[PageRun]) -> io::Result<Vec<PageRun>> {
        let asked = self.asked()?;
        let mut runs: Vec<PageRun> = Vec::new();
        let mut rest = self.piece.run;
        while !rest.is_empty() {
            let (run, after) = rest.split_at(Backing::Hugetlb.granule().pages());
            rest = after;
            let near = known.get(known.partition_point(|known| known.end() <= run.first));
            let is_known = near.is_some_and(|known| known.contains(run.first));
            if !is_known && !asked.holds((run.first - self.piece.run.first).to_bytes())? {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end() == run.first => last.pages = PageCount(last.pages.0 + run.pages.0),
                _ => runs.push(run),
            }
        }
        Ok(runs)
    }
}

fn is_memfd(piece: &Piece) -> bool {
    piece.shared && piece.backing == Backing::Memfd
}

/// What one page table covers (Intel SDM volume 3, 5.5.4): once it is there, its pages cost little.
const PAGE_TABLE: u64 = 2 << 20;

/// From where in the file there is data at all.
fn page_tables_in_file(piece: &Piece, file: &File, offset: u64) -> io::Result<Vec<PageRun>> {
    let end = offset + piece.run.len().0;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut at = offset;
    while at < end {
        let data = match lseek(file, i64::try_from(at).unwrap_or(i64::MAX), Whence::SeekData) {
            Ok(data) if data.unsigned_abs() < end => data.unsigned_abs(),
            Ok(_) | Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        // By where it is in this piece, which begins wherever it does in the file and in the address space.
        let from = (data - offset) / PAGE_TABLE * PAGE_TABLE;
        let to = (from + PAGE_TABLE).min(end - offset);
        let first = piece.run.first + PageCount(from >> PAGE_SHIFT);
        let pages = PageCount((to - from).div_ceil(1 << PAGE_SHIFT));
        match runs.last_mut() {
            Some(last) if last.end() == first => last.pages = PageCount(last.pages.0 + pages.0),
            _ => runs.push(PageRun::new(piece.run.block, first, pages)),
        }
        at = offset + to;
    }
    Ok(runs)
}

/// From the data and holes of the file behind shared memory, whoever wrote it.
fn in_file(piece: &Piece, file: &File, offset: u64) -> io::Result<Vec<PageRun>> {
    let end = offset + piece.run.len().0;
    let mut runs = Vec::new();
    let mut at = offset;
    while at < end {
        let seek = |at: u64, whence| lseek(file, i64::try_from(at).unwrap_or(i64::MAX), whence);
        let data = match seek(at, Whence::SeekData) {
            Ok(data) => data.unsigned_abs().min(end),
            Err(Errno::ENXIO) => end,
            Err(error) => return Err(error.into()),
        };
        if data == end {
            break;
        }
        let hole = seek(data, Whence::SeekHole)?.unsigned_abs().min(end);
        let first = piece.run.first + PageCount((data - offset) >> PAGE_SHIFT);
        runs.push(PageRun::new(piece.run.block, first, PageCount((hole - data).div_ceil(1 << PAGE_SHIFT))));
        at = hole;
    }
    Ok(runs)
}

/// From this process's page table: right for private memory, and, of huge pages of a file, for those that are mapped
/// here.
fn in_page_table(piece: &Piece) -> io::Result<Vec<PageRun>> {
    let table = PageTable::open()?;
    let ranges = match piece.shared && piece.backing == Backing::Hugetlb {
        true => table.mapped(piece.host, piece.run.len())?,
        false => table.existing(piece.host, piece.run.len())?,
    };
    let run = |range: Range<HostAddr>| {
        let first = piece.run.first + (range.start - piece.host).to_pages();
        PageRun::new(piece.run.block, first, (range.end - range.start).to_pages())
    };
    Ok(ranges.into_iter().map(run).collect())
}

#[cfg(test)]
mod tests {
    use page_units::{ByteLen, GuestAddr};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::RamSpec;

    #[test]
    fn page_tables_are_found_fast_and_refined_to_pages() {
        let mib = |mib: u64| ByteLen(mib << 20);
        let spec = RamSpec::new("ram").at(GuestAddr(0), mib(9)).at(GuestAddr(1 << 32), mib(4));
        let ram = GuestRam::allocate(&[spec], Backing::Memfd).unwrap();
        let touch = |guest: u64| ram.memory().write_slice(&[1], GuestAddress(guest)).unwrap();
        // Pages of the first piece: 0, 5, 511, 1024, and the last, which is alone in half a page table.
        [0, 5, 511, 1024, 2303].into_iter().for_each(|page| touch(page << PAGE_SHIFT));
        // Of the second, which begins in the middle of what would be one of the file: its last page.
        touch((1 << 32) + mib(4).0 - 1);
        let run = |first: u64, pages: u64| {
            PageRun::new(page_units::BlockId(0), page_units::PageIndex(first), PageCount(pages))
        };
        let existing = Existing::new(&ram).unwrap();
        let mut pages = existing.shared_page_tables().unwrap();
        assert_eq!(pages, [vec![run(0, 512), run(1024, 512), run(2048, 256)], vec![run(2304 + 512, 512)]]);
        existing.refine(&mut pages).unwrap();
        let exact = [vec![run(0, 1), run(5, 1), run(511, 1), run(1024, 1), run(2303, 1)], vec![run(2304 + 1023, 1)]];
        assert_eq!(pages, exact);
        assert_eq!(existing.shared_pages().unwrap(), exact);
    }
}
