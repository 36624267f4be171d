//! Which pages of guest memory exist at all. The others are zero, and are not touched to find that out: touching them
//! would make them exist.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_source::{FileOffset, HostAddr, PAGE_SHIFT, PageCount, PageRun};
use uffd_engine::{Backing, HugeFile, PageTable};

use crate::memory::{GuestRam, Piece};

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
        self.look_up(|_| true)
    }

    /// Of shared memory alone.
    pub(crate) fn shared_pages(&self) -> io::Result<Vec<PageRun>> {
        Ok(self.look_up(|piece| piece.shared)?.concat())
    }

    fn look_up(&self, wanted: impl Fn(&Piece) -> bool) -> io::Result<Vec<Vec<PageRun>>> {
        let pieces = self.ram.pieces().iter().enumerate();
        let of = |(number, piece): (usize, &Piece)| match self.ram.file_of(number) {
            _ if !wanted(piece) => Ok(Vec::new()),
            // What nobody has touched here is what the file holds, or another process has written.
            Some(_) if !piece.shared => Ok(vec![piece.run]),
            None if piece.shared => Ok(vec![piece.run]),
            Some((file, offset)) if piece.backing == Backing::Memfd => in_file(piece, file, offset),
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
