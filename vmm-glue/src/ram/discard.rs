//! Giving guest memory back: at once, or, while a live snapshot has it frozen, when that is over.

use std::io;
use std::sync::Arc;

use page_units::{ByteLen, GuestAddr, HostAddr};
use parking_lot::Mutex;

use super::{GuestRam, MemoryError};
use crate::sys;

/// What became of memory that was to be given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Discard {
    /// It reads as zeros from now on.
    Done,
    /// A live snapshot still needs what is there. It is given back when that snapshot is over, one way or the other.
    HeldOff,
}

/// Whether memory is frozen, and what is to be given back afterwards.
#[derive(Debug, Default)]
pub(super) struct Frozen(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    claimed: bool,
    held_off: Vec<Range>,
}

#[derive(Clone, Copy, Debug)]
struct Range {
    start: HostAddr,
    length: ByteLen,
    shared: bool,
}

impl Range {
    fn give_back(self) -> io::Result<()> {
        sys::give_back(self.start, self.length, self.shared)
    }
}

/// The right to freeze some memory, which one snapshot at a time has.
#[derive(Debug)]
pub(crate) struct FreezeClaim(Arc<GuestRam>);

impl FreezeClaim {
    /// `None` if somebody else has it.
    pub(crate) fn new(ram: &Arc<GuestRam>) -> Option<FreezeClaim> {
        let mut state = ram.frozen.0.lock();
        (!std::mem::replace(&mut state.claimed, true)).then(|| FreezeClaim(Arc::clone(ram)))
    }
}

impl Drop for FreezeClaim {
    fn drop(&mut self) {
        let mut state = self.0.frozen.0.lock();
        for range in std::mem::take(&mut state.held_off) {
            if let Err(error) = range.give_back() {
                log::error!("giving back {} bytes at {} after a snapshot failed: {error}", range.length, range.start);
            }
        }
        state.claimed = false;
    }
}

impl GuestRam {
    /// Gives memory back, as a balloon does: whole pages of the backing, which read as zeros then. While a live snapshot
    /// needs them it is held off, and done at its end; the guest has promised not to use them until it asks for them
    /// again, which a device model answers only when they are [given back](Discard::Done) or it does not matter.
    ///
    /// Memory that is still being loaded has to know: with [`Discards::Events`](uffd_engine::Discards) it does, otherwise
    /// use [`Engine::discard`](uffd_engine::Engine::discard), which is not held off but
    /// [refused](uffd_engine::DiscardError::Frozen) while a live snapshot needs the memory.
    ///
    /// # Errors
    /// If this is not whole pages of one piece of the RAM, or the system refuses.
    pub fn discard(&self, guest: GuestAddr, length: ByteLen) -> Result<Discard, MemoryError> {
        let failed = |reason: String| MemoryError::Discard { guest, length, reason };
        let inside = self.pieces.iter().find(|piece| {
            piece.guest <= guest && guest - piece.guest < piece.len() && length <= piece.len() - (guest - piece.guest)
        });
        let piece = inside.ok_or_else(|| failed("that is not inside of one piece of the RAM".into()))?;
        let start = piece.host + (guest - piece.guest);
        if length.0 == 0 || !(start.0 | length.0).is_multiple_of(piece.backing.granule().bytes().0) {
            return Err(failed(format!("that is not whole pages of {}", piece.backing.granule().bytes())));
        }
        let range = Range { start, length, shared: piece.shared };
        // Held until it is done: a snapshot does not begin in the middle of it.
        let mut state = self.frozen.0.lock();
        if state.claimed {
            state.held_off.push(range);
            return Ok(Discard::HeldOff);
        }
        range.give_back().map_err(|error| failed(error.to_string()))?;
        Ok(Discard::Done)
    }
}
