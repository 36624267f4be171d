//! Flat memory files that are to become snapshots: what their holes mean, and layers of them.
//!
//! A hole in a full memory file is zero memory. A hole in a diff (Firecracker's `Diff` snapshot, Cloud Hypervisor's and
//! others' incremental files) means that the page did not change. The file does not say which of the two it is.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use mapped_ram::Snapshot;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_files::FlatBlock;
use page_source::is_zero;
use page_units::{BlockId, PAGE_SIZE, PageCount, PageIndex, PageRun};

use crate::commands::Failure;

/// How much is copied in one go.
const STEP: usize = 1 << 20;

/// A page that a flat file has a hole for, and that is not zero elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hole {
    pub(crate) block: String,
    pub(crate) page: PageIndex,
    /// How many pages of the file are in holes.
    pub(crate) holes: u64,
    pub(crate) pages: u64,
}

/// Finds the first page that is in a hole of `flat`, though `template` has content for it. That of a full memory file
/// is rarely one: a guest seldom gives memory back.
pub(crate) fn hole(flat: &File, blocks: &[FlatBlock], template: &Snapshot) -> Result<Option<Hole>, Failure> {
    let size = flat.metadata()?.len();
    let mut first = None;
    let mut holes = 0;
    for (number, block) in blocks.iter().enumerate() {
        let id = BlockId(u32::try_from(number)?);
        let end = block.offset.0.saturating_add(block.block.length().0).min(size);
        let mut at = block.offset.0;
        while at < end {
            let data = data_from(flat, at..end)?;
            // Pages that are wholly in the hole.
            let (from, to) = (at.next_multiple_of(PAGE_SIZE), data.start - data.start % PAGE_SIZE);
            if from < to {
                let page = |offset: u64| (offset - block.offset.0) / PAGE_SIZE;
                let run = PageRun::new(id, PageIndex(page(from)), PageCount((to - from) / PAGE_SIZE));
                holes += run.pages.0;
                if first.is_none() {
                    first = content(template, run)?.map(|page| (block.block.name().to_owned(), page));
                }
            }
            at = data.end;
        }
    }
    let pages = size / PAGE_SIZE;
    Ok(first.map(|(block, page)| Hole { block, page, holes, pages }))
}

/// The first page of a run that is not zero in a snapshot.
fn content(snapshot: &Snapshot, run: PageRun) -> Result<Option<PageIndex>, Failure> {
    let Some(place) = snapshot.block(run.block).filter(|place| place.in_file) else { return Ok(None) };
    let mut page = vec![0; usize::try_from(PAGE_SIZE)?];
    let mut rest = run;
    while !rest.is_empty() {
        let found = snapshot.load_run(run.block, rest.first, rest.pages)?;
        let (now, later) = rest.split_at(found.pages().max(PageCount(1)));
        for index in (now.first.0..now.first.0 + now.pages.0).filter(|_| found.is_stored()) {
            let at = place.pages_offset + PageIndex(index).byte_offset();
            snapshot
                .read_exact_at(&mut page, at)
                .map_err(|error| format!("{}: reading at offset {at} failed: {error}", snapshot.path().display()))?;
            if !is_zero(&page) {
                return Ok(Some(PageIndex(index)));
            }
        }
        rest = later;
    }
    Ok(None)
}

/// The next stretch of data in a part of a file; an empty one at its end if there is none.
fn data_from(file: &File, part: Range<u64>) -> io::Result<Range<u64>> {
    let seek = |from: u64, whence| lseek(file, i64::try_from(from).unwrap_or(i64::MAX), whence).map(i64::cast_unsigned);
    let start = match seek(part.start, Whence::SeekData) {
        Ok(start) => start.clamp(part.start, part.end),
        Err(Errno::ENXIO) => return Ok(part.end..part.end),
        // A file system that knows no holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(part),
        Err(error) => return Err(error.into()),
    };
    let end = match seek(start, Whence::SeekHole) {
        Ok(end) => end.clamp(start, part.end),
        Err(Errno::ENXIO | Errno::EINVAL | Errno::EOPNOTSUPP) => part.end,
        Err(error) => return Err(error.into()),
    };
    Ok(start..end)
}

/// One file of several layers: what a later one has no hole for replaces what was before. It has no name, and is in the
/// directory of `beside`.
pub(crate) fn merge(layers: &[&Path], beside: &Path) -> Result<File, Failure> {
    let directory = beside.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let merged = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_TMPFILE)
        .mode(0o600)
        .open(directory)
        .map_err(|error| format!("{}: making space for the layers failed: {error}", directory.display()))?;
    for layer in layers {
        let named = |error: io::Error| Failure::from(format!("{}: {error}", layer.display()));
        let file = File::open(layer).map_err(named)?;
        let size = file.metadata().map_err(named)?.len();
        let known = merged.metadata()?.len();
        if known != 0 && known != size {
            let first = layers.first().unwrap_or(layer).display();
            return Err(format!("{} has {size} bytes, but {first} has {known}", layer.display()).into());
        }
        merged.set_len(size)?;
        let mut at = 0;
        let mut buffer = vec![0; STEP];
        while at < size {
            let data = data_from(&file, at..size).map_err(named)?;
            at = data.start;
            while at < data.end {
                let length = usize::try_from(data.end - at)?.min(STEP);
                let bytes = buffer.get_mut(..length).unwrap_or_default();
                file.read_exact_at(bytes, at).map_err(named)?;
                merged
                    .write_all_at(bytes, at)
                    .map_err(|error| format!("{}: merging the layers failed: {error}", directory.display()))?;
                at += length as u64;
            }
        }
    }
    Ok(merged)
}
