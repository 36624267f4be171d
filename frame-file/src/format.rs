//! Where things are in a file. `docs/frame-file.md` has the same in prose.
//!
//! ```text
//! frame 0 | frame 1 | ... | skippable frame: index | skippable frame: seek table
//! ```
//!
//! The seek table is that of the Zstandard seekable format 0.1.0 without checksums
//! (`contrib/seekable_format/zstd_seekable_compression_format.md` in zstd's sources). All numbers are little-endian.

use page_units::{ByteLen, FileOffset};

use crate::{Codec, Digest};

/// The most bytes that one frame with content may decode to.
pub const MAX_FRAME: ByteLen = ByteLen(1 << 20);
/// The most zero bytes that one frame stands for.
pub const MAX_ZEROS: ByteLen = ByteLen(1 << 31);
/// The most frames of a file: a limit of the Zstandard seekable format.
pub const MAX_FRAMES: u64 = 0x0800_0000;

/// Begins the skippable frame of the index; any of `0x184D2A50..=0x184D2A5F` is skipped by `zstd` and `lz4`.
pub(crate) const INDEX_MAGIC: u32 = 0x184D_2A5D;
/// Begins the skippable frame of the seek table.
pub(crate) const TABLE_MAGIC: u32 = 0x184D_2A5E;
/// Ends the seek table, and the file.
pub(crate) const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
/// Magic number and length of a skippable frame.
pub(crate) const SKIPPABLE_HEADER: usize = 8;
/// An entry of the seek table: encoded and decoded length.
pub(crate) const ENTRY: usize = 8;
/// Number of frames, descriptor, magic number.
pub(crate) const FOOTER: usize = 9;

/// Begins the trailer of the index.
pub(crate) const TRAILER_MAGIC: [u8; 8] = *b"frmidx01";
/// Length of the trailer in bytes.
pub(crate) const TRAILER: usize = 104;
/// How many frames one leaf of the tree covers.
pub(crate) const LEAF: usize = 128;
/// How many nodes one piece of an inner level has at most.
pub(crate) const FAN: usize = 64;
/// Length of a node: encoded start, decoded start, digest.
pub(crate) const NODE: usize = 48;
const _: () = assert!(NODE == 8 + 8 + Digest::LEN);

/// The numbers that everything else in the index follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) codec: Codec,
    /// The most bytes that a frame with content decodes to in this file.
    pub(crate) frame_limit: u32,
    /// How many bytes all frames decode to.
    pub(crate) decoded: u64,
    /// Where the frames end and the index begins.
    pub(crate) encoded: u64,
    pub(crate) frames: u64,
    /// Of the topmost piece of the tree.
    pub(crate) top: Digest,
}

impl Trailer {
    pub(crate) fn to_bytes(self) -> [u8; TRAILER] {
        let mut bytes = [0; TRAILER];
        bytes[..8].copy_from_slice(&TRAILER_MAGIC);
        bytes[8] = self.codec.tag();
        bytes[12..16].copy_from_slice(&self.frame_limit.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.decoded.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.encoded.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.frames.to_le_bytes());
        bytes[40..72].copy_from_slice(self.top.as_bytes());
        let root = Digest::of(&bytes[..72]);
        bytes[72..].copy_from_slice(root.as_bytes());
        bytes
    }

    /// The trailer and the root digest, or what is wrong.
    pub(crate) fn parse(bytes: &[u8; TRAILER]) -> Result<(Trailer, Digest), &'static str> {
        let root = Digest::of(&bytes[..72]);
        if bytes[72..] != root.as_bytes()[..] {
            return Err("the trailer does not match its digest");
        }
        let codec = Codec::from_tag(bytes[8]).ok_or("an unknown codec")?;
        if bytes[9..12] != [0; 3] {
            return Err("reserved bytes are not zero");
        }
        let trailer = Trailer {
            codec,
            frame_limit: u32_at(bytes, 12),
            decoded: u64_at(bytes, 16),
            encoded: u64_at(bytes, 24),
            frames: u64_at(bytes, 32),
            top: digest_at(bytes, 40),
        };
        if trailer.frame_limit == 0 || u64::from(trailer.frame_limit) > MAX_FRAME.0 {
            return Err("the limit of a frame's length is out of range");
        }
        if trailer.frames > MAX_FRAMES {
            return Err("more frames than the format can have");
        }
        Ok((trailer, root))
    }
}

/// Where the parts of the index and the seek table are; follows from the number of frames and the end of the frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    /// The digests of the frames.
    pub(crate) digests: FileOffset,
    /// Each level of nodes, from the leaves' up: where it is and how many nodes it has. The last is the top.
    pub(crate) levels: Vec<(FileOffset, u64)>,
    pub(crate) trailer: FileOffset,
    /// The first entry of the seek table.
    pub(crate) table: FileOffset,
    /// The end of the file.
    pub(crate) end: FileOffset,
}

impl Places {
    /// `None` if the numbers can't be those of a file.
    pub(crate) fn new(encoded: u64, frames: u64) -> Option<Places> {
        if frames > MAX_FRAMES {
            return None;
        }
        let digests = encoded.checked_add(SKIPPABLE_HEADER as u64)?;
        let mut at = digests.checked_add(frames * Digest::LEN as u64)?;
        let mut levels = Vec::new();
        let mut nodes = frames.div_ceil(LEAF as u64);
        loop {
            levels.push((FileOffset(at), nodes));
            at = at.checked_add(nodes * NODE as u64)?;
            if nodes <= FAN as u64 {
                break;
            }
            nodes = nodes.div_ceil(FAN as u64);
        }
        let trailer = at;
        let table = trailer.checked_add(TRAILER as u64)?.checked_add(SKIPPABLE_HEADER as u64)?;
        let end = table.checked_add(frames * ENTRY as u64)?.checked_add(FOOTER as u64)?;
        Some(Places {
            digests: FileOffset(digests),
            levels,
            trailer: FileOffset(trailer),
            table: FileOffset(table),
            end: FileOffset(end),
        })
    }

    /// The length of the index without the header of its skippable frame.
    pub(crate) fn index_len(&self) -> u64 {
        self.trailer.0 + TRAILER as u64 - self.digests.0
    }
}

/// Whether the footer at the end of a file is that of a seek table; the number of frames.
pub(crate) fn parse_footer(footer: &[u8; FOOTER]) -> Option<u64> {
    (u32_at(footer, 5) == SEEKABLE_MAGIC && footer[4] == 0).then(|| u64::from(u32_at(footer, 0)))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

pub(crate) fn digest_at(bytes: &[u8], at: usize) -> Digest {
    let mut field = [0; Digest::LEN];
    field.copy_from_slice(&bytes[at..at + Digest::LEN]);
    Digest::from_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailer_is_read_as_it_was_written_and_no_flipped_bit_is_missed() {
        let trailer = Trailer {
            codec: Codec::Lz4,
            frame_limit: 65536,
            decoded: 1 << 40,
            encoded: 12345,
            frames: 99,
            top: Digest::of(b"top"),
        };
        let bytes = trailer.to_bytes();
        assert_eq!(Trailer::parse(&bytes).unwrap().0, trailer);
        for bit in 64..TRAILER * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Trailer::parse(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_index_has_as_many_levels_as_it_needs() {
        let levels = |frames| Places::new(0, frames).unwrap().levels.iter().map(|level| level.1).collect::<Vec<_>>();
        assert_eq!(levels(0), [0]);
        assert_eq!(levels(1), [1]);
        assert_eq!(levels((LEAF * FAN) as u64), [FAN as u64]);
        assert_eq!(levels((LEAF * FAN) as u64 + 1), [FAN as u64 + 1, 2]);
        assert_eq!(levels(MAX_FRAMES), [1 << 20, 1 << 14, 1 << 8, 4]);
        assert_eq!(Places::new(u64::MAX - 100, 10), None);
    }
}
