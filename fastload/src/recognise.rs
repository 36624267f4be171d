//! What a file is that is not a snapshot of QEMU's, and what helps: people have disk images, libvirt's images,
//! compressed files and other hypervisors' memory, and mean the right thing.
//!
//! [`at`] looks at a file before it is opened as a snapshot: a disk image may have the beginning of a stream in one of
//! its clusters. Nothing here trusts what it reads: a length is a number to compare, never one to allocate.

mod directory;
pub(crate) mod libvirt;
mod qcow2;
mod table;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use frame_file::FrameFile;
use libvirt::{Format, Header};
use page_units::FileOffset;

use crate::commands::serving::quoted;

/// How much of the beginning of a file is looked at: superblocks of file systems are in it.
const HEAD: usize = 128 << 10;
/// How much of its end: the footer of a fixed VHD is one sector.
const TAIL: usize = 512;

/// What is known of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// A snapshot may be in it, where it is looked for.
    Perhaps,
    /// The image of libvirt's that is a snapshot with a header in front: the stream begins here.
    Libvirt(Header, FileOffset),
    /// Something else: what, and what helps.
    Other(String),
}

/// What is looked at.
#[derive(Debug)]
struct Sight<'a> {
    head: &'a [u8],
    tail: &'a [u8],
    /// The list of saved states, if the file is a qcow2 image that has one.
    states: &'a [u8],
    size: u64,
    path: &'a Path,
}

/// Looks at a file.
///
/// # Errors
/// If it can't be opened or read.
pub(crate) fn at(path: &Path) -> io::Result<Known> {
    // Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    let meta = file.metadata()?;
    if meta.is_dir() {
        return Ok(directory::at(path).map_or(Known::Perhaps, Known::Other));
    }
    if !meta.is_file() {
        return Ok(Known::Perhaps);
    }
    // It begins like any compressed file, and ends with an index.
    if FrameFile::is_frame_file(&file)? {
        return Ok(Known::Perhaps);
    }
    let size = meta.len();
    let head = part(&file, 0, size, HEAD)?;
    let tail = part(&file, size.saturating_sub(TAIL as u64), size, TAIL)?;
    let states = match qcow2::states_at(&head) {
        Some(at) if at < size => part(&file, at, size, HEAD)?,
        _ => Vec::new(),
    };
    Ok(seen(&Sight { head: &head, tail: &tail, states: &states, size, path }))
}

/// What helps with a file in which no stream was found, and that is nothing known: memory has no mark of its own.
pub(crate) fn unknown(path: &Path) -> String {
    let meta = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
    let size = meta.map_or(0, |meta| meta.len());
    if size > 0 && size.is_multiple_of(page_units::PAGE_SIZE) {
        return format!(
            "; if it is flat memory (Firecracker's memory file, Cloud Hypervisor's memory-ranges, QEMU's pmemsave), \
             name a --template for the rest of the snapshot: fastload convert {} OUT --template SNAPSHOT",
            quoted(path)
        );
    }
    String::new()
}

fn part(file: &File, from: u64, size: u64, most: usize) -> io::Result<Vec<u8>> {
    let length = usize::try_from(size.saturating_sub(from)).unwrap_or(most).min(most);
    let mut bytes = vec![0; length];
    let mut have = 0;
    while let Some(rest) = bytes.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, from + have as u64) {
            // It has become shorter.
            Ok(0) => break,
            Ok(more) => have += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(have);
    Ok(bytes)
}

fn seen(sight: &Sight<'_>) -> Known {
    if sight.size == 0 {
        return Known::Other("it is empty: nothing was saved into it, or the save has only begun".into());
    }
    if let Some(header) = Header::parse(sight.head) {
        return from_libvirt(sight, header);
    }
    match table::TABLE.iter().find(|entry| entry.fits(sight)) {
        Some(entry) => Known::Other(format!("it is {}", entry.text(sight))),
        None => Known::Perhaps,
    }
}

fn from_libvirt(sight: &Sight<'_>, header: Header) -> Known {
    let file = quoted(sight.path);
    let again = format!(
        "to have a snapshot that can be loaded at once: virsh restore {file}, then: virsh save DOMAIN OUT \
         --image-format sparse (libvirt 11.2 or later)"
    );
    if header.unfinished {
        return Known::Other(
            "it is an image of libvirt's that was not finished (LibvirtQemudPart): the save failed, was cancelled, or \
             still goes on; save the domain again"
                .into(),
        );
    }
    match (header.format, header.stream()) {
        (Format::Sparse, at) if at.0 < sight.size => Known::Libvirt(header, at),
        (Format::Sparse, at) => Known::Other(format!(
            "it is an image of libvirt's (sparse) that ends at offset {}, before its stream begins at {at}: it was \
             truncated",
            FileOffset(sight.size)
        )),
        (Format::Raw, _) => Known::Other(format!(
            "it is an image of libvirt's in the format raw, a plain migration stream whose pages are not at fixed \
             offsets; {again}"
        )),
        (Format::Compressed(how), _) => {
            Known::Other(format!("it is an image of libvirt's, compressed with {how}; {again}"))
        }
        (Format::Unknown(number), _) => Known::Other(format!(
            "it is an image of libvirt's in a format that is not known here (number {number}); {again}"
        )),
    }
}

#[cfg(test)]
mod tests;
