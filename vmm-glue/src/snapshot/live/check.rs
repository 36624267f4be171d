//! What can be known before a vCPU stops.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use mapped_ram::Writer;
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;
use page_units::{ByteLen, PageCount};

use super::LiveError;
use super::mappings::{self, Other};
use crate::ram::GuestRam;

/// Space for device state and headers, whose length is not known before.
const METADATA: ByteLen = ByteLen(1 << 20);

/// Whether every write to this memory can be caught.
pub(super) fn memory(ram: &GuestRam) -> Result<(), LiveError> {
    if let Some(guest) = ram.cut_off().map_err(LiveError::Populated)? {
        return Err(LiveError::Memory { guest, what: "cut off: its file ends there" });
    }
    let mut ranges = Vec::new();
    for (number, piece) in ram.pieces().iter().enumerate() {
        let refused = |what| Err(LiveError::Memory { guest: piece.guest, what });
        match (piece.shared, ram.file_of(number)) {
            (false, None) => {}
            (true, None) => return refused("shared memory without a file"),
            (false, Some(_)) => return refused("a private mapping of a file"),
            (true, Some((file, offset))) if in_memory(file) => {
                let of = file.metadata().map_err(LiveError::Populated)?;
                ranges.push(((of.dev(), of.ino()), offset, offset.saturating_add(piece.run.len().0), piece.guest));
            }
            (true, Some(_)) => return refused("a mapping of a file on a disk"),
        }
    }
    // A write through one mapping is not seen by the protection of the other.
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2) {
        Some(pair) => Err(LiveError::Memory { guest: pair[1].3, what: "a second mapping of the same part of a file" }),
        None => Ok(()),
    }
}

/// Whether this process has that memory mapped only once, as far as it could write to it.
pub(super) fn mappings(ram: &GuestRam) -> Result<(), LiveError> {
    match mappings::other(ram).map_err(LiveError::Mappings)? {
        Some(Other { guest, mapped }) => Err(LiveError::MappedTwice { guest, start: mapped.start, end: mapped.end }),
        None => Ok(()),
    }
}

fn in_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|of| matches!(of.filesystem_type(), TMPFS_MAGIC | HUGETLBFS_MAGIC))
}

/// Whether what exists of the memory, and what is `missing` of it, fits on the disk of the file that `writer` has begun.
/// Its name may lie elsewhere: a symlink is followed.
pub(super) fn space(ram: &GuestRam, writer: &Writer, missing: PageCount) -> Result<(), LiveError> {
    let (file, path) = (writer.file(), writer.path());
    let runs = ram.populated().map_err(LiveError::Populated)?;
    let pages = PageCount(missing.0 + runs.iter().map(|run| run.pages.0).sum::<u64>());
    // A bit for each page, whether it exists or not.
    let needed = ByteLen(pages.to_bytes().0 + ram.layout().total().to_pages().0 / 8 + METADATA.0);
    let of = fstatvfs(file).map_err(|errno| LiveError::Statistics { path: path.into(), error: errno.into() })?;
    let available = ByteLen(of.blocks_available().saturating_mul(of.fragment_size()));
    if needed > available {
        return Err(LiveError::Space { path: path.into(), needed, available });
    }
    Ok(())
}
