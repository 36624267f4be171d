//! Building the index and the seek table from the lengths and digests of all frames.

use crate::format::{
    ENTRY, FAN, FOOTER, INDEX_MAGIC, LEAF, NODE, Places, SEEKABLE_MAGIC, SKIPPABLE_HEADER, TABLE_MAGIC, Trailer,
};
use crate::piece::{At, Node};
use crate::{Codec, Digest, EncodeError};

/// A frame as the index knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) encoded: u32,
    pub(crate) decoded: u32,
    pub(crate) digest: Digest,
}

/// Everything that follows the frames, and the root digest.
pub(crate) fn build(entries: &[Entry], codec: Codec, frame_limit: u32) -> Result<(Vec<u8>, Digest), EncodeError> {
    let mut end = At { encoded: 0, decoded: 0 };
    let mut nodes = Vec::new();
    let mut table = Vec::with_capacity(entries.len() * ENTRY);
    let mut digests = Vec::with_capacity(entries.len() * Digest::LEN);
    for leaf in entries.chunks(LEAF) {
        let start = end;
        let (from, digests_from) = (table.len(), digests.len());
        for entry in leaf {
            table.extend_from_slice(&entry.encoded.to_le_bytes());
            table.extend_from_slice(&entry.decoded.to_le_bytes());
            digests.extend_from_slice(entry.digest.as_bytes());
            end.encoded += u64::from(entry.encoded);
            end.decoded += u64::from(entry.decoded);
        }
        nodes.push(Node { start, digest: Digest::of_parts(&[&table[from..], &digests[digests_from..]]) });
    }
    let frames = entries.len() as u64;
    let too_large = || EncodeError::TooMany { limit: crate::MAX_FRAMES };
    let places = Places::new(end.encoded, frames).ok_or_else(too_large)?;
    let index_len = u32::try_from(places.index_len()).map_err(|_| too_large())?;
    let table_len = u32::try_from(frames * ENTRY as u64 + FOOTER as u64).map_err(|_| too_large())?;
    let frames_field = u32::try_from(frames).map_err(|_| too_large())?;

    let mut bytes = Vec::new();
    bytes.reserve_exact(usize::try_from(places.end.0 - end.encoded).unwrap_or_default());
    bytes.extend_from_slice(&INDEX_MAGIC.to_le_bytes());
    bytes.extend_from_slice(&index_len.to_le_bytes());
    bytes.append(&mut digests);
    let mut level = to_bytes(&nodes);
    while nodes.len() > FAN {
        nodes = nodes
            .chunks(FAN)
            .zip(level.chunks(FAN * NODE))
            .map(|(children, bytes)| Node { start: children[0].start, digest: Digest::of(bytes) })
            .collect();
        bytes.append(&mut level);
        level = to_bytes(&nodes);
    }
    let trailer =
        Trailer { codec, frame_limit, decoded: end.decoded, encoded: end.encoded, frames, top: Digest::of(&level) };
    bytes.append(&mut level);
    let trailer = trailer.to_bytes();
    bytes.extend_from_slice(&trailer);
    bytes.extend_from_slice(&TABLE_MAGIC.to_le_bytes());
    bytes.extend_from_slice(&table_len.to_le_bytes());
    bytes.append(&mut table);
    bytes.extend_from_slice(&frames_field.to_le_bytes());
    bytes.push(0);
    bytes.extend_from_slice(&SEEKABLE_MAGIC.to_le_bytes());
    debug_assert_eq!(bytes.len() as u64, places.end.0 - end.encoded);
    debug_assert_eq!(SKIPPABLE_HEADER, 8);
    let root = Trailer::parse(&trailer).map_or(Digest::ZEROS, |(_, root)| root);
    Ok((bytes, root))
}

fn to_bytes(nodes: &[Node]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(nodes.len() * NODE);
    for node in nodes {
        bytes.extend_from_slice(&node.start.encoded.to_le_bytes());
        bytes.extend_from_slice(&node.start.decoded.to_le_bytes());
        bytes.extend_from_slice(node.digest.as_bytes());
    }
    bytes
}
