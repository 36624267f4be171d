//! Giving guest memory back: at once, or, while a live snapshot has it frozen, when that is over.

use std::ops::Range;
use std::sync::Arc;

use page_units::{ByteLen, GuestAddr};
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
    /// By piece, as many as needed. A guest can ask again and again: the same page is held off once.
    held_off: Vec<Granules>,
}

/// Granules of a piece, a bit for each: 32 KiB for a GiB of small pages, whatever a guest asks for.
#[derive(Clone, Debug, Default)]
struct Granules(Vec<u64>);

impl Granules {
    fn insert(&mut self, granules: Range<usize>) {
        if self.0.len() * 64 < granules.end {
            self.0.resize(granules.end.div_ceil(64), 0);
        }
        for granule in granules {
            self.0[granule / 64] |= 1 << (granule % 64);
        }
    }

    /// The first run at `from` or behind it.
    fn next(&self, from: usize) -> Option<Range<usize>> {
        let bits = self.0.len() * 64;
        let is_set = |granule: &usize| self.0[granule / 64] >> (granule % 64) & 1 == 1;
        let mut first = from;
        while first < bits && !is_set(&first) {
            // A whole word of none at once.
            first = if self.0[first / 64] == 0 { (first / 64 + 1) * 64 } else { first + 1 };
        }
        (first < bits).then(|| first..(first..bits).find(|granule| !is_set(granule)).unwrap_or(bits))
    }
}

impl GuestRam {
    fn give_back(&self, held_off: &[Granules]) {
        for (piece, granules) in self.pieces.iter().zip(held_off) {
            let granule = piece.backing.granule().bytes().0;
            let mut at = 0;
            while let Some(run) = granules.next(at) {
                at = run.end;
                let [start, length] = [run.start, run.len()].map(|granules| ByteLen(granules as u64 * granule));
                if let Err(error) = sys::give_back(piece.host + start, length, piece.shared) {
                    log::error!(
                        "giving back {length} bytes at {} after a snapshot failed: {error}",
                        piece.guest + start
                    );
                }
            }
        }
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
        // What takes long holds up no device; what is discarded meanwhile is held off once more.
        let held_off = std::mem::take(&mut self.0.frozen.0.lock().held_off);
        self.0.give_back(&held_off);
        let mut state = self.0.frozen.0.lock();
        self.0.give_back(&std::mem::take(&mut state.held_off));
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
        let inside = self.pieces.iter().enumerate().find(|(_, piece)| {
            piece.guest <= guest && guest - piece.guest < piece.len() && length <= piece.len() - (guest - piece.guest)
        });
        let (number, piece) = inside.ok_or_else(|| failed("that is not inside of one piece of the RAM".into()))?;
        let (offset, granule) = (guest - piece.guest, piece.backing.granule().bytes());
        if length.0 == 0 || !(offset.0 | length.0).is_multiple_of(granule.0) {
            return Err(failed(format!("that is not whole pages of {granule}")));
        }
        // Held until it is done: a snapshot does not begin in the middle of it.
        let mut state = self.frozen.0.lock();
        if state.claimed {
            if state.held_off.len() <= number {
                state.held_off.resize_with(number + 1, Granules::default);
            }
            let [first, count] = [offset, length].map(|bytes| bytes.get() / granule.get());
            state.held_off[number].insert(first..first + count);
            return Ok(Discard::HeldOff);
        }
        sys::give_back(piece.host + offset, length, piece.shared).map_err(|error| failed(error.to_string()))?;
        Ok(Discard::Done)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uffd_engine::Backing;

    use super::*;
    use crate::RamSpec;

    const PAGES: u64 = 300;

    /// Two pieces, every page of which has content.
    fn ram(backing: Backing) -> Arc<GuestRam> {
        let half = ByteLen(PAGES / 2 * 4096);
        let spec = RamSpec::new("ram").at(GuestAddr(0), half).at(GuestAddr(1 << 32), half);
        let ram = GuestRam::allocate(&[spec], backing).unwrap();
        (0..PAGES).for_each(|page| ram.write(at(page), &[0x5a; 4096]).unwrap());
        Arc::new(ram)
    }

    fn at(page: u64) -> GuestAddr {
        let half = PAGES / 2;
        if page < half { GuestAddr(page * 4096) } else { GuestAddr((1 << 32) + (page - half) * 4096) }
    }

    fn is_zero(ram: &GuestRam, page: u64) -> bool {
        let mut bytes = [1; 4096];
        ram.read(at(page), &mut bytes).unwrap();
        assert!([0, 0x5a].iter().any(|&byte| bytes == [byte; 4096]), "page {page} is whole");
        bytes[0] == 0
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn exactly_what_was_held_off_is_given_back_in_the_end(
            discards in prop::collection::vec((0..PAGES, 1..80u64), 0..40),
            shared: bool,
        ) {
            let ram = ram(if shared { Backing::Memfd } else { Backing::Anonymous });
            let claim = FreezeClaim::new(&ram).unwrap();
            let mut expected = vec![false; PAGES.try_into().unwrap()];
            for (first, count) in discards {
                let half = PAGES / 2;
                let count = count.min(if first < half { half } else { PAGES } - first);
                prop_assert_eq!(ram.discard(at(first), ByteLen(count * 4096)).unwrap(), Discard::HeldOff);
                (first..first + count).for_each(|page| expected[usize::try_from(page).unwrap()] = true);
            }
            prop_assert!((0..PAGES).all(|page| !is_zero(&ram, page)), "the snapshot still needs it");
            drop(claim);
            let found: Vec<bool> = (0..PAGES).map(|page| is_zero(&ram, page)).collect();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(ram.discard(at(0), ByteLen(4096)).unwrap(), Discard::Done);
        }
    }

    #[test]
    fn a_guest_that_floods_discards_costs_no_more_memory_than_its_pages_have_bits() {
        let ram = ram(Backing::Anonymous);
        let claim = FreezeClaim::new(&ram).unwrap();
        for page in (0..PAGES).cycle().take(200_000) {
            ram.discard(at(page), ByteLen(4096)).unwrap();
        }
        let words: usize = ram.frozen.0.lock().held_off.iter().map(|granules| granules.0.capacity()).sum();
        assert!(words <= 16, "{words} words for {PAGES} pages");
        drop(claim);
        assert!((0..PAGES).all(|page| is_zero(&ram, page)));
    }
}
