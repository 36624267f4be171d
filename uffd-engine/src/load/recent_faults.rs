//! Where the guest has touched missing content lately: a small ring that handlers write and loaders empty, without a
//! lock. Losing an entry loses nothing but an idea of where to go on.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::memory::Place;

const SLOTS: usize = 16;
const AREA_SHIFT: u32 = 48;

#[derive(Debug, Default)]
pub(crate) struct RecentFaults {
    slots: [AtomicU64; SLOTS],
    next: AtomicUsize,
}

impl RecentFaults {
    pub(crate) fn push(&self, place: Place) {
        let code = (place.area as u64) << AREA_SHIFT | (place.granule as u64 + 1);
        let at = self.next.fetch_add(1, Ordering::Relaxed) % SLOTS;
        self.slots[at].store(code, Ordering::Relaxed);
    }

    /// The latest one that has not been taken.
    pub(crate) fn pop(&self) -> Option<Place> {
        let next = self.next.load(Ordering::Relaxed);
        (1..=SLOTS).find_map(|back| {
            let slot = &self.slots[next.wrapping_sub(back) % SLOTS];
            if slot.load(Ordering::Relaxed) == 0 {
                return None;
            }
            let code = slot.swap(0, Ordering::Relaxed);
            let granule = (code & ((1 << AREA_SHIFT) - 1)).checked_sub(1)?;
            let area = usize::try_from(code >> AREA_SHIFT).ok()?;
            Some(Place { area, granule: usize::try_from(granule).ok()? })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latest_first_and_bounded() {
        let hints = RecentFaults::default();
        assert_eq!(hints.pop(), None);
        for granule in 0..20 {
            hints.push(Place { area: 3, granule });
        }
        let all: Vec<_> = std::iter::from_fn(|| hints.pop()).map(|place| (place.area, place.granule)).collect();
        assert_eq!(all, (4..20).rev().map(|granule| (3, granule)).collect::<Vec<_>>());
    }
}
