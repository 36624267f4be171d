//! A piece of the index: up to [`FAN`](crate::format::FAN) nodes, or a leaf of [`LEAF`](crate::format::LEAF) frames. It
//! is believed only after its digest was compared, and its numbers fit between those of its neighbours.

use crate::Digest;
use crate::format::{ENTRY, MAX_ZEROS, NODE, digest_at, u32_at, u64_at};

/// A position in both worlds: in the compressed file, and in what it decodes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) encoded: u64,
    pub(crate) decoded: u64,
}

/// Where a frame, or a piece of the next lower level, begins, and its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) start: At,
    pub(crate) digest: Digest,
}

#[derive(Debug)]
pub(crate) struct Piece {
    nodes: Box<[Node]>,
    end: At,
}

impl Piece {
    /// Reads nodes of an inner level, which must lie between `start` and `end`.
    pub(crate) fn of_nodes(bytes: &[u8], digest: Digest, start: At, end: At) -> Result<Piece, &'static str> {
        if Digest::of(bytes) != digest {
            return Err("a piece of it does not match its digest");
        }
        let node = |bytes: &[u8]| Node {
            start: At { encoded: u64_at(bytes, 0), decoded: u64_at(bytes, 8) },
            digest: digest_at(bytes, 16),
        };
        let nodes: Box<[Node]> = bytes.chunks_exact(NODE).map(node).collect();
        let piece = Piece { nodes, end };
        piece.check(start)?;
        Ok(piece)
    }

    /// Reads a leaf: entries of the seek table and the digests of as many frames.
    pub(crate) fn of_frames(
        entries: &[u8],
        digests: &[u8],
        digest: Digest,
        start: At,
        end: At,
        limit: u64,
    ) -> Result<Piece, &'static str> {
        if Digest::of_parts(&[entries, digests]) != digest {
            return Err("a piece of it does not match its digest");
        }
        let mut at = start;
        let mut nodes = Vec::with_capacity(entries.len() / ENTRY);
        for (entry, digest) in entries.chunks_exact(ENTRY).zip(digests.chunks_exact(Digest::LEN)) {
            let (encoded, decoded) = (u64::from(u32_at(entry, 0)), u64::from(u32_at(entry, 4)));
            let digest = digest_at(digest, 0);
            let most = if digest == Digest::ZEROS { MAX_ZEROS.0 } else { limit };
            if decoded > most {
                return Err("a frame is longer than a frame may be");
            }
            nodes.push(Node { start: at, digest });
            // Sums of 128 numbers of 32 bits, after a number that a check bounded by the length of the file.
            at = At { encoded: at.encoded.saturating_add(encoded), decoded: at.decoded.saturating_add(decoded) };
        }
        if at != end {
            return Err("the lengths of frames do not add up");
        }
        let piece = Piece { nodes: nodes.into(), end };
        piece.check(start)?;
        Ok(piece)
    }

    /// Whether it begins at `start`, and each node begins after the one before it.
    fn check(&self, start: At) -> Result<(), &'static str> {
        if self.nodes.first().is_none_or(|node| node.start != start) {
            return Err("a piece does not begin where it should");
        }
        let ends = self.nodes[1..].iter().map(|node| node.start).chain([self.end]);
        let mut pairs = self.nodes.iter().map(|node| node.start).zip(ends);
        match pairs.all(|(start, end)| start.encoded < end.encoded && start.decoded < end.decoded) {
            true => Ok(()),
            false => Err("frames overlap, or are empty"),
        }
    }

    /// The index of a file that has no frame.
    pub(crate) fn empty() -> Piece {
        Piece { nodes: Box::default(), end: At { encoded: 0, decoded: 0 } }
    }

    /// Which node holds a decoded position that lies in the piece.
    pub(crate) fn find(&self, decoded: u64) -> usize {
        self.nodes.partition_point(|node| node.start.decoded <= decoded).saturating_sub(1)
    }

    /// A node, and where it ends.
    pub(crate) fn get(&self, node: usize) -> (Node, At) {
        let end = self.nodes.get(node + 1).map_or(self.end, |next| next.start);
        (self.nodes[node], end)
    }
}
