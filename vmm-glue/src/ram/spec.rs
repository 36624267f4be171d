//! What memory to allocate, and why that may fail.

use std::io;

use page_units::{ByteLen, GuestAddr, LayoutError};
use uffd_engine::Backing;

/// A RAM block to allocate, and where the guest sees it. A block may be seen in several pieces, as a PC's RAM is
/// around the hole below 4 GiB.
#[derive(Clone, Debug)]
pub struct RamSpec {
    name: String,
    pieces: Vec<(GuestAddr, ByteLen)>,
}

impl RamSpec {
    /// A block of that name, with no memory yet.
    #[must_use]
    pub fn new(name: impl Into<String>) -> RamSpec {
        RamSpec { name: name.into(), pieces: Vec::new() }
    }

    /// The next `length` bytes of the block are at `guest`.
    #[must_use]
    pub fn at(mut self, guest: GuestAddr, length: ByteLen) -> RamSpec {
        self.pieces.push((guest, length));
        self
    }

    /// The block's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its pieces in the order of the block's pages: where the guest sees them, and how long they are.
    #[must_use]
    pub fn pieces(&self) -> &[(GuestAddr, ByteLen)] {
        &self.pieces
    }

    /// How long all its pieces are together; `None` if that is no number.
    #[must_use]
    pub fn length(&self) -> Option<ByteLen> {
        self.pieces.iter().try_fold(ByteLen(0), |sum, piece| sum.checked_add(piece.1))
    }

    /// Memory of `length` bytes as PCs have it: up to 3 GiB from 0 on, the rest from 4 GiB on.
    #[must_use]
    pub fn pc(name: impl Into<String>, length: ByteLen) -> RamSpec {
        let low = length.min(ByteLen(3 << 30));
        let spec = RamSpec::new(name).at(GuestAddr(0), low);
        if length > low { spec.at(GuestAddr(4 << 30), length - low) } else { spec }
    }
}

/// Why guest memory can't be made, or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The blocks are impossible.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The pieces overlap or are empty.
    #[error("guest memory can't be put together: {0}")]
    Collection(String),
    /// The system refused memory.
    #[error("{length} bytes of {backing:?} memory for RAM block \"{block}\" are unavailable: {reason}")]
    Allocate {
        /// The block.
        block: String,
        /// How much.
        length: ByteLen,
        /// Of what kind.
        backing: Backing,
        /// What the system said.
        reason: String,
    },
    /// Memory could not be given back.
    #[error("{length} bytes at guest-physical {guest} can't be given back: {reason}")]
    Discard {
        /// Where.
        guest: GuestAddr,
        /// How much.
        length: ByteLen,
        /// Why not.
        reason: String,
    },
    /// Memory could not be read or written.
    #[error("guest memory at {guest} ({length} bytes) can't be accessed: {reason}")]
    Access {
        /// Where.
        guest: GuestAddr,
        /// How much was left.
        length: ByteLen,
        /// Why not.
        reason: String,
    },
    /// KVM refused a memory slot.
    #[error("KVM refuses {length} bytes of RAM at guest-physical {guest}: {error}")]
    Slot {
        /// Where.
        guest: GuestAddr,
        /// How much.
        length: ByteLen,
        /// What KVM said.
        #[source]
        error: io::Error,
    },
}
