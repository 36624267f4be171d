//! Giving pages back through the engine.

use page_units::{ByteLen, PageRun};

use super::intake::Intake;
use crate::DiscardError;
use crate::memory::Place;
use crate::memory::states::State;
use crate::pause::PausePoint;
use crate::serve::events;
use crate::sys::memory::give_back;

impl Intake {
    /// Gives pages back to the host. Waits for installs of them that are under way.
    pub(crate) fn discard(&self, run: PageRun) -> Result<(), DiscardError> {
        if self.memory.view.descriptor.foreign() {
            return Err(DiscardError::Foreign);
        }
        let parts: Vec<_> = self.memory.view.parts(run).collect();
        let covered: u64 = parts.iter().map(|(_, part)| part.pages.0).sum();
        let whole = |&(area, part): &(usize, PageRun)| {
            let area = self.memory.area(area);
            let from = part.first - area.region.run.first;
            from.0.is_multiple_of(area.granule.0) && part.pages.0.is_multiple_of(area.granule.0)
        };
        if covered != run.pages.0 || !parts.iter().all(whole) {
            return Err(DiscardError::Outside(run));
        }
        // Until it is done no freeze begins.
        let _discarding = self.memory.view.discarding.read();
        if let Some(frozen) = self.memory.view.frozen() {
            let needed = |&(area, part): &(usize, PageRun)| {
                let area = self.memory.area(area);
                let start = area.addr(area.granule_of(part.first));
                frozen.needs(start, start + part.len())
            };
            if parts.iter().any(needed) {
                return Err(DiscardError::Frozen(run));
            }
        }
        for (number, part) in parts {
            let area = self.memory.area(number);
            let first = area.granule_of(part.first);
            let granules = ByteLen(part.pages.0 / area.granule.0).get();
            for granule in first..first + granules {
                self.memory.pauses.at(PausePoint::Discarding);
                while events::remove(&self.memory, self, Place { area: number, granule }) == State::InFlight {
                    std::thread::yield_now();
                }
            }
            let given_back = give_back(area.addr(first), part.len(), area.region.shared);
            // Waiters there wait for content that never comes: they fault again, and get zeros.
            self.memory.wake(Place { area: number, granule: first }, granules);
            given_back.map_err(|error| DiscardError::System { run: part, error })?;
        }
        Ok(())
    }
}
