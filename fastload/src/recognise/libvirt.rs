//! The header that libvirt puts in front of a stream (`virsh save`, `virsh managedsave`).
//!
//! libvirt `src/qemu/qemu_saveimage.h`, `struct _virQEMUSaveHeader`, 92 bytes in the byte order of the host that wrote
//! it; then `data_len` bytes: the domain's XML and a cookie, with zeros behind; then the stream.

use page_units::FileOffset;

/// Length of the header.
pub(super) const LENGTH: usize = 92;
/// What a complete image begins with.
pub(super) const SAVE: &[u8; 16] = b"LibvirtQemudSave";
/// What an image begins with that is not complete.
pub(super) const PART: &[u8; 16] = b"LibvirtQemudPart";
/// The version that all of libvirt's releases of this century write.
const VERSION: u32 = 2;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Whether libvirt had not finished it.
    pub(super) unfinished: bool,
    /// Whether the guest was running, and is to run again.
    pub(crate) was_running: bool,
    pub(super) format: Format,
    /// Length of what is between the header and the stream.
    data: u32,
}

/// How the stream is kept (`virQEMUSaveFormat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Compressed(&'static str),
    /// A mapped-ram file, but for the header in front of it.
    Sparse,
    Unknown(u32),
}

impl Header {
    /// Reads it; `None` if it is not one.
    pub(super) fn parse(head: &[u8]) -> Option<Header> {
        let magic = head.get(..16)?;
        let unfinished = magic == PART;
        if !unfinished && magic != SAVE {
            return None;
        }
        let word = |number: usize| -> Option<[u8; 4]> {
            let at = 16 + 4 * number;
            head.get(at..at + 4)?.try_into().ok()
        };
        // A host of the other byte order wrote it.
        let swapped = u32::from_le_bytes(word(0)?) != VERSION && u32::from_be_bytes(word(0)?) == VERSION;
        let number = |at: usize| word(at).map(if swapped { u32::from_be_bytes } else { u32::from_le_bytes });
        let format = match number(3)? {
            0 => Format::Raw,
            1 => Format::Compressed("gzip"),
            2 => Format::Compressed("bzip2"),
            3 => Format::Compressed("xz"),
            4 => Format::Compressed("lzop"),
            5 => Format::Compressed("zstd"),
            6 => Format::Sparse,
            other => Format::Unknown(other),
        };
        Some(Header { unfinished, was_running: number(2)? != 0, format, data: number(1)? })
    }

    /// Where the stream begins.
    pub(super) fn stream(&self) -> FileOffset {
        FileOffset(LENGTH as u64 + u64::from(self.data))
    }
}
