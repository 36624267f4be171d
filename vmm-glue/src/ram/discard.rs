//! Giving guest memory back: at once, or, while a live snapshot has it frozen, when that is over.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use page_units::{ByteLen, GuestAddr};
use parking_lot::Mutex;

use super::guest_ram::Piece;
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
    /// The snapshot is over, and what was held off is being given back.
    over: bool,
    /// By piece: a bit for each granule that is to be given back, however often a guest says so.
    held_off: Vec<Vec<u64>>,
}

impl State {
    fn hold_off(&mut self, number: usize, piece: &Piece, granules: Range<usize>) {
        if self.held_off.len() <= number {
            self.held_off.resize(number + 1, Vec::new());
        }
        let bits = &mut self.held_off[number];
        if bits.is_empty() {
            bits.resize(granules_of(piece, piece.len()).div_ceil(64), 0);
        }
        granules.for_each(|granule| bits[granule / 64] |= 1 << (granule % 64));
    }
}

fn granules_of(piece: &Piece, length: ByteLen) -> usize {
    ByteLen(length.0 / piece.backing.granule().bytes().0).get()
}

fn give_back(piece: &Piece, granules: Range<usize>) -> io::Result<()> {
    let bytes = |granules: usize| ByteLen(ByteLen::of(granules).0 * piece.backing.granule().bytes().0);
    sys::give_back(piece.host + bytes(granules.start), bytes(granules.len()), piece.shared)
}

/// The runs of bits that are set.
fn runs(bits: &[u64]) -> impl Iterator<Item = Range<usize>> {
    let (mut at, end) = (0, bits.len() * 64);
    let set = |bit: usize| bits[bit / 64] >> (bit % 64) & 1 == 1;
    std::iter::from_fn(move || {
        while at < end && !set(at) {
            // A word at a time, where there is nothing.
            at += if bits[at / 64] >> (at % 64) == 0 { 64 - at % 64 } else { 1 };
        }
        let first = at;
        while at < end && set(at) {
            at += 1;
        }
        (first < at).then_some(first..at)
    })
}

/// The right to freeze some memory, which one snapshot at a time has.
#[derive(Debug)]
pub(crate) struct FreezeClaim(Arc<GuestRam>);

impl FreezeClaim {
    /// `None` if another snapshot has it.
    pub(crate) fn new(ram: &Arc<GuestRam>) -> Option<FreezeClaim> {
        let mut state = ram.frozen.0.lock();
        (!std::mem::replace(&mut state.claimed, true)).then(|| FreezeClaim(Arc::clone(ram)))
    }
}

impl Drop for FreezeClaim {
    /// The lock is not held while memory is given back: device models go on. No snapshot begins before it is done.
    fn drop(&mut self) {
        let frozen = &self.0.frozen.0;
        let held_off = {
            let mut state = frozen.lock();
            state.over = true;
            std::mem::take(&mut state.held_off)
        };
        for (piece, bits) in self.0.pieces.iter().zip(&held_off) {
            for granules in runs(bits) {
                if let Err(error) = give_back(piece, granules.clone()) {
                    log::error!(
                        "giving back {} granules of the piece at {} after a snapshot failed: {error}",
                        granules.len(),
                        piece.guest
                    );
                }
            }
        }
        let mut state = frozen.lock();
        state.claimed = false;
        state.over = false;
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
        let inside = self.pieces.iter().enumerate().find(|(_, piece)| {
            piece.guest <= guest && guest - piece.guest < piece.len() && length <= piece.len() - (guest - piece.guest)
        });
        let (number, piece) = inside.ok_or_else(|| failed("that is not inside of one piece of the RAM".into()))?;
        let start = piece.host + (guest - piece.guest);
        if length.0 == 0 || !(start.0 | length.0).is_multiple_of(piece.backing.granule().bytes().0) {
            return Err(failed(format!("that is not whole pages of {}", piece.backing.granule().bytes())));
        }
        let first = granules_of(piece, guest - piece.guest);
        let granules = first..first + granules_of(piece, length);
        // Held until it is done: a snapshot does not begin in the middle of it.
        let mut state = self.frozen.0.lock();
        if state.claimed && !state.over {
            state.hold_off(number, piece, granules);
            return Ok(Discard::HeldOff);
        }
        give_back(piece, granules).map_err(|error| failed(error.to_string()))?;
        Ok(Discard::Done)
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng};
    use uffd_engine::Backing;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::RamSpec;

    const PAGES: usize = 1000;

    fn ram(backing: Backing) -> Arc<GuestRam> {
        let half = ByteLen(PAGES as u64 / 2 * 4096);
        let spec = RamSpec::new("ram").at(GuestAddr(0), half).at(GuestAddr(1 << 32), half);
        Arc::new(GuestRam::allocate(&[spec], backing).unwrap())
    }

    fn guest(page: usize) -> GuestAddr {
        let high = page >= PAGES / 2;
        let page = (page - if high { PAGES / 2 } else { 0 }) as u64;
        GuestAddr(page * 4096 + if high { 1 << 32 } else { 0 })
    }

    /// A guest gives all kinds of ranges back, again and again: each page of them is zero at the end, and no other.
    #[test]
    fn what_was_held_off_is_given_back_once_the_snapshot_is_over() {
        let mut random = StdRng::seed_from_u64(testkit::seed::seed());
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let ram = ram(backing);
            let write = |page| ram.memory().write_slice(&[7; 4096], GuestAddress(guest(page).0)).unwrap();
            (0..PAGES).for_each(write);
            let claim = FreezeClaim::new(&ram).unwrap();
            let mut gone = vec![false; PAGES];
            for _ in 0..200 {
                let half = random.random_range(0..2) * (PAGES / 2);
                let first = random.random_range(0..PAGES / 2);
                let count = random.random_range(1..=(PAGES / 2 - first).min(9));
                let length = ByteLen(count as u64 * 4096);
                assert_eq!(ram.discard(guest(half + first), length).unwrap(), Discard::HeldOff);
                gone[half + first..half + first + count].fill(true);
            }
            let read = |page| {
                let mut bytes = [1; 4096];
                ram.memory().read_slice(&mut bytes, GuestAddress(guest(page).0)).unwrap();
                bytes
            };
            assert!((0..PAGES).all(|page| read(page) == [7; 4096]), "the snapshot needs it");
            assert!(FreezeClaim::new(&ram).is_none());
            drop(claim);
            for page in 0..PAGES {
                assert_eq!(read(page) == [0; 4096], gone[page], "{backing:?}, page {page}");
            }
            assert_eq!(ram.discard(guest(0), ByteLen(4096)).unwrap(), Discard::Done);
            drop(FreezeClaim::new(&ram).unwrap());
        }
    }

    /// A guest that gives one page back without pause costs a bit for each of its pages, and no more.
    #[test]
    fn a_guest_that_floods_discards_costs_no_memory() {
        let ram = ram(Backing::Anonymous);
        let claim = FreezeClaim::new(&ram).unwrap();
        for turn in 0..1_000_000 {
            ram.discard(guest(turn % 3), ByteLen(4096)).unwrap();
        }
        let words: usize = ram.frozen.0.lock().held_off.iter().map(Vec::capacity).sum();
        assert!(words <= PAGES.div_ceil(64), "{words} words");
        drop(claim);
    }

    #[test]
    fn runs_of_bits_are_found_across_words() {
        assert_eq!(runs(&[0, 0]).count(), 0);
        assert_eq!(runs(&[u64::MAX, 1]).collect::<Vec<_>>(), [0..65]);
        assert_eq!(runs(&[0b1011, 1 << 63, u64::MAX]).collect::<Vec<_>>(), [0..2, 3..4, 127..192]);
    }
}
