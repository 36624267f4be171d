//! Which pages of guest memory exist at all. The others are zero, and are not touched to find that out: touching them
//! would make them exist.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_source::{PAGE_SHIFT, PageCount, PageIndex, PageRun};
use uffd_engine::Backing;

use crate::memory::Piece;

/// Present, or swapped out: bits 63 and 62 of an entry of `/proc/self/pagemap`
/// (Linux Documentation/admin-guide/mm/pagemap.rst).
const EXISTS: u64 = 3 << 62;
const ENTRIES: usize = 8192;

/// The pages of `piece` that may be other than zero.
pub(crate) fn populated(piece: &Piece, file: Option<(&File, u64)>) -> io::Result<Vec<PageRun>> {
    match file {
        Some((file, offset)) if piece.backing == Backing::Memfd && piece.shared => in_file(piece, file, offset),
        _ => in_page_table(piece),
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

/// From this process's page table: right for private memory.
fn in_page_table(piece: &Piece) -> io::Result<Vec<PageRun>> {
    if piece.backing == Backing::Hugetlb {
        return huge_in_page_table(piece);
    }
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut buffer = vec![0; 8 * ENTRIES];
    let mut page = PageIndex(0);
    while page.0 < piece.run.pages.0 {
        let now = usize::try_from(piece.run.pages.0 - page.0).unwrap_or(ENTRIES).min(ENTRIES);
        let at = ((piece.host.0 >> PAGE_SHIFT) + page.0) * 8;
        pagemap.read_exact_at(&mut buffer[..8 * now], at)?;
        for entry in buffer[..8 * now].as_chunks::<8>().0 {
            if u64::from_le_bytes(*entry) & EXISTS != 0 {
                let index = piece.run.first + PageCount(page.0);
                match runs.last_mut() {
                    Some(last) if last.end() == index => last.pages = PageCount(last.pages.0 + 1),
                    _ => runs.push(PageRun::single(piece.run.block, index)),
                }
            }
            page += PageCount(1);
        }
    }
    Ok(runs)
}

/// The same for huge pages, of which the first entry tells for all.
fn huge_in_page_table(piece: &Piece) -> io::Result<Vec<PageRun>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let huge = Backing::Hugetlb.granule().pages();
    let mut runs: Vec<PageRun> = Vec::new();
    let mut entry = [0; 8];
    for page in (0..piece.run.pages.0).step_by(usize::try_from(huge.0).unwrap_or(1)) {
        pagemap.read_exact_at(&mut entry, ((piece.host.0 >> PAGE_SHIFT) + page) * 8)?;
        if u64::from_le_bytes(entry) & EXISTS == 0 {
            continue;
        }
        let run = PageRun::new(piece.run.block, piece.run.first + PageCount(page), huge).intersect(piece.run);
        match runs.last_mut() {
            Some(last) if last.end() == run.first => last.pages = PageCount(last.pages.0 + run.pages.0),
            _ => runs.push(run),
        }
    }
    Ok(runs)
}
