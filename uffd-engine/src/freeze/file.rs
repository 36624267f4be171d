//! What a file in memory (memfd, tmpfs) holds: where, and how many pages in all.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_units::{ByteLen, FileOffset, PAGE_SHIFT, PageCount, PageIndex, PageRun};

use crate::memory::region::Region;

/// The unit of `st_blocks` (stat(2)). Of a file in memory it counts its pages, those that are swapped out too, and nothing
/// else (Linux mm/shmem.c, fs/hugetlbfs/inode.c).
const BLOCK: u64 = 512;

/// What one page table covers (Intel SDM volume 3, 5.5.4): once it is there, its pages cost little.
const PAGE_TABLE: u64 = 2 << 20;

/// Device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Inode(u64, u64);

impl Inode {
    pub(super) fn of(file: &File) -> io::Result<Inode> {
        file.metadata().map(|of| Inode(of.dev(), of.ino()))
    }
}

/// How much memory a file takes.
pub(super) fn held(file: &File) -> io::Result<ByteLen> {
    file.metadata().map(|of| ByteLen(of.blocks().saturating_mul(BLOCK)))
}

fn seek(file: &File, at: u64, whence: Whence) -> Result<u64, Errno> {
    lseek(file, i64::try_from(at).unwrap_or(i64::MAX), whence).map(i64::unsigned_abs)
}

/// The pages of `part`, which begins at `offset` of the file, that hold data, wherever it came from.
pub(super) fn data(file: &File, offset: FileOffset, part: PageRun) -> io::Result<Vec<PageRun>> {
    let end = offset.0 + part.len().0;
    let mut runs = Vec::new();
    let mut at = offset.0;
    while at < end {
        let data = match seek(file, at, Whence::SeekData) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = match seek(file, data, Whence::SeekHole) {
            Ok(hole) => hole.min(end),
            // What was there a moment ago was punched, and nothing comes behind it.
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let first = page_at(part, data - offset.0);
        add(&mut runs, PageRun::new(part.block, first, PageCount((hole - data).div_ceil(1 << PAGE_SHIFT))));
        at = hole;
    }
    Ok(runs)
}

/// The same where it takes little time, whatever there is: all pages that have a page table in common with one that holds
/// data.
///
/// To write-protect the holes among them is harmless, and much faster than to leave them out. Harmless: where there is
/// no page the kernel leaves a marker in the page table (`PTE_MARKER_UFFD_WP`, Linux include/linux/swapops.h), which
/// allocates no page; touching the hole still raises a missing fault. Faster: 1 GiB of which every second page exists is
/// 65000 runs; to look them up takes 30 ms and to protect each by itself 45, together seven times what it takes to protect
/// all at once.
pub(super) fn page_tables(file: &File, offset: FileOffset, part: PageRun) -> io::Result<Vec<PageRun>> {
    let end = offset.0 + part.len().0;
    let mut runs: Vec<PageRun> = Vec::new();
    let mut at = offset.0;
    while at < end {
        let data = match seek(file, at, Whence::SeekData) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        // By where it is in this part, which begins wherever it does in the file and in the address space.
        let from = (data - offset.0) / PAGE_TABLE * PAGE_TABLE;
        let to = (from + PAGE_TABLE).min(end - offset.0);
        let pages = PageCount((to - from).div_ceil(1 << PAGE_SHIFT));
        add(&mut runs, PageRun::new(part.block, page_at(part, from), pages));
        at = offset.0 + to;
    }
    Ok(runs)
}

fn page_at(part: PageRun, offset: u64) -> PageIndex {
    part.first + PageCount(offset >> PAGE_SHIFT)
}

/// Adds a run behind the others, or to the last one.
pub(super) fn add(runs: &mut Vec<PageRun>, run: PageRun) {
    match runs.last_mut() {
        Some(last) if last.block == run.block && last.end() == run.first => last.pages += run.pages,
        _ => runs.push(run),
    }
}

/// A file that is frozen as a whole: its page count tells whether a page went, or came, that the freeze knows nothing of.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) file: Arc<File>,
    inode: Inode,
    /// The regions that it is behind.
    pub(super) regions: Vec<usize>,
}

/// Those of the files behind some regions that hold nothing but these regions.
pub(super) fn watched(regions: &[Region]) -> io::Result<Vec<Watched>> {
    let mut files: Vec<Watched> = Vec::new();
    for (number, region) in regions.iter().enumerate().filter(|(_, region)| region.shared) {
        let Some((file, _)) = &region.file else { continue };
        let inode = Inode::of(file)?;
        match files.iter_mut().find(|known| known.inode == inode) {
            Some(known) => known.regions.push(number),
            None => files.push(Watched { file: Arc::clone(file), inode, regions: vec![number] }),
        }
    }
    let mut whole = Vec::new();
    for watched in files {
        let covered: u64 = watched.regions.iter().map(|&number| regions[number].len().0).sum();
        if watched.file.metadata()?.len() <= covered {
            whole.push(watched);
        }
    }
    Ok(whole)
}
