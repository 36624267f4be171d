//! Finding a frame. The index is read piece by piece, when a piece is first needed.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use page_units::{ByteLen, FileOffset};
use parking_lot::RwLock;

use crate::format::{ENTRY, FAN, LEAF, NODE, Places, Trailer};
use crate::piece::{At, Node, Piece};
use crate::{Digest, ReadError};

/// How many leaves are kept in memory at most: 3 MiB of index.
const KEPT_LEAVES: u64 = 512;

/// A frame of an open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub(crate) number: u64,
    pub(crate) encoded: Range<FileOffset>,
    pub(crate) decoded: Range<FileOffset>,
    pub(crate) digest: Digest,
}

impl Frame {
    /// Its number in the file.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Where it is in the compressed file.
    #[must_use]
    pub fn encoded(&self) -> Range<FileOffset> {
        self.encoded.clone()
    }

    /// Which bytes of the content it holds.
    #[must_use]
    pub fn decoded(&self) -> Range<FileOffset> {
        self.decoded.clone()
    }

    /// How many bytes it decodes to.
    #[must_use]
    pub fn decoded_len(&self) -> ByteLen {
        self.decoded.end - self.decoded.start
    }

    /// Whether it stands for zero bytes, and need not be decoded.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.digest == Digest::ZEROS
    }

    /// The digest of its bytes in the compressed file; `None` of a frame that [is zero](Frame::is_zero).
    #[must_use]
    pub fn digest(&self) -> Option<Digest> {
        (!self.is_zero()).then_some(self.digest)
    }
}

/// A leaf and its number.
type Kept = RwLock<Option<(u64, Arc<Piece>)>>;

#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) trailer: Trailer,
    pub(crate) places: Places,
    top: Piece,
    /// The pieces of the levels below the top, from the leaves' nodes up.
    inner: Vec<Box<[OnceLock<Piece>]>>,
    /// Leaf `n` is kept in slot `n % len`.
    leaves: Box<[Kept]>,
}

impl Index {
    /// `top` is the topmost piece, read and checked.
    pub(crate) fn new(trailer: Trailer, places: Places, top: Piece) -> Index {
        let below = &places.levels[..places.levels.len() - 1];
        let inner =
            below.iter().map(|(_, nodes)| (0..nodes.div_ceil(FAN as u64)).map(|_| OnceLock::new()).collect()).collect();
        let kept = trailer.frames.div_ceil(LEAF as u64).min(KEPT_LEAVES);
        let leaves = (0..kept).map(|_| Kept::default()).collect();
        Index { trailer, places, top, inner, leaves }
    }

    /// The frame that holds the decoded byte at `offset`, which the content has.
    pub(crate) fn find(&self, file: &File, offset: FileOffset) -> Result<Frame, ReadError> {
        let (mut node, mut end) = self.top.get(self.top.find(offset.0));
        let mut number = self.top.find(offset.0) as u64;
        for level in (0..self.inner.len()).rev() {
            let piece = self.inner_piece(file, level, number, node, end)?;
            let child = piece.find(offset.0);
            number = number * FAN as u64 + child as u64;
            (node, end) = piece.get(child);
        }
        let leaf = self.leaf(file, number, node, end)?;
        let child = leaf.find(offset.0);
        let (node, end) = leaf.get(child);
        Ok(Frame {
            number: number * LEAF as u64 + child as u64,
            encoded: FileOffset(node.start.encoded)..FileOffset(end.encoded),
            decoded: FileOffset(node.start.decoded)..FileOffset(end.decoded),
            digest: node.digest,
        })
    }

    /// The piece `number` of the nodes of a level, which `node` above it stands for.
    fn inner_piece(&self, file: &File, level: usize, number: u64, node: Node, end: At) -> Result<&Piece, ReadError> {
        let beyond = || ReadError::Index { at: self.places.trailer, what: "a level has too few pieces" };
        let slot = usize::try_from(number).ok().and_then(|number| self.inner[level].get(number)).ok_or_else(beyond)?;
        if let Some(piece) = slot.get() {
            return Ok(piece);
        }
        let (base, nodes) = self.places.levels[level];
        let first = number * FAN as u64;
        let bytes = read(file, base + ByteLen(first * NODE as u64), (nodes - first).min(FAN as u64) * NODE as u64)?;
        let corrupt = |what| ReadError::Index { at: base + ByteLen(first * NODE as u64), what };
        let piece = Piece::of_nodes(&bytes, node.digest, node.start, end).map_err(corrupt)?;
        Ok(slot.get_or_init(|| piece))
    }

    fn leaf(&self, file: &File, number: u64, node: Node, end: At) -> Result<Arc<Piece>, ReadError> {
        let slot = &self.leaves[usize::try_from(number % self.leaves.len() as u64).unwrap_or_default()];
        if let Some((kept, piece)) = &*slot.read()
            && *kept == number
        {
            return Ok(Arc::clone(piece));
        }
        let first = number * LEAF as u64;
        let frames = self.trailer.frames.saturating_sub(first).min(LEAF as u64);
        let at = self.places.table + ByteLen(first * ENTRY as u64);
        let entries = read(file, at, frames * ENTRY as u64)?;
        let digests =
            read(file, self.places.digests + ByteLen(first * Digest::LEN as u64), frames * Digest::LEN as u64)?;
        let limit = u64::from(self.trailer.frame_limit);
        let piece = Piece::of_frames(&entries, &digests, node.digest, node.start, end, limit)
            .map_err(|what| ReadError::Index { at, what })?;
        let piece = Arc::new(piece);
        *slot.write() = Some((number, Arc::clone(&piece)));
        Ok(piece)
    }
}

/// Reads a part of the index. Its length was bounded by the number of nodes of a piece.
pub(crate) fn read(file: &File, at: FileOffset, length: u64) -> Result<Vec<u8>, ReadError> {
    let mut bytes = vec![0; ByteLen(length).get()];
    file.read_exact_at(&mut bytes, at.0).map_err(|error| ReadError::Read { at, error })?;
    Ok(bytes)
}
