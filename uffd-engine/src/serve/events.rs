//! What the guest gave back.

use page_units::{ByteLen, HostAddr};

use crate::memory::gate::Alone;
use crate::memory::states::State;
use crate::memory::{Memory, Place};
use crate::pause::PausePoint;
use crate::stats::bump;

impl Memory {
    /// The guest gave a range back: what was there is gone, and reads as zeros. `alone`: [`Memory::reading`].
    pub(crate) fn removed(&self, alone: Option<&Alone<'_>>, start: HostAddr, end: HostAddr) {
        self.pauses.at(PausePoint::DiscardRead);
        if let Some(shared) = alone.and_then(|gate| gate.as_ref()) {
            shared.given_back(start, end);
        }
        for (number, area) in self.areas.iter().enumerate() {
            let range = area.region.range();
            let (from, to) = (start.max(range.start), end.min(range.end));
            if from >= to {
                continue;
            }
            let granule = area.granule.to_bytes().0;
            let first = ByteLen((from - range.start).0 / granule).get();
            let last = ByteLen((to - range.start).0.div_ceil(granule)).get();
            let mut waited_for = false;
            for at in first..last {
                waited_for |= self.remove_granule(number, at) == State::Missing;
            }
            // What these waited for never comes: they fault again, and get zeros.
            if waited_for {
                drop(self.descriptor.wake(area.addr(first), area.len_of(last - first)));
            }
        }
    }

    /// A granule was given back, unless it is being installed. Answers what it was; somebody may wait for content that
    /// was Missing, whoever calls this wakes them.
    pub(crate) fn remove_granule(&self, number: usize, granule: usize) -> State {
        let area = &self.areas[number];
        let was = area.states.remove(granule);
        if was != State::InFlight {
            let place = Place { area: number, granule };
            if area.states.unrequest(granule) {
                self.answered(area.granule.0);
            }
            self.latencies.forget(place);
            if !area.small() {
                self.staging.settled(place, None);
            }
            if was != State::Removed {
                bump(&self.counters.removed, area.granule.0);
            }
        }
        was
    }
}
