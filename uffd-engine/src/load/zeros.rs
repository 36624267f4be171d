//! Pages that are zero: noted, and installed only where somebody waits for them.

use super::install::Content;
use super::intake::{Flow, Intake};
use crate::memory::Place;
use crate::memory::states::State;
use crate::stats::bump;

impl Intake {
    /// One granule is zero. Installed only if somebody waits for it.
    pub(super) fn zero_granule(&self, number: usize, granule: usize) -> Flow {
        let area = self.memory.area(number);
        let was = self.memory.states(number).mark_zero(granule);
        if was.state != State::Missing {
            self.not_taken(number, granule);
            return Flow::Continue(());
        }
        if was.wanted {
            self.wanted_zero(Place { area: number, granule })?;
        } else {
            bump(&self.memory.counters.zero_skipped, area.granule.0);
        }
        if was.requested {
            self.answered(area.granule.0);
        }
        Flow::Continue(())
    }

    fn wanted_zero(&self, place: Place) -> Flow {
        loop {
            let gate = self.memory.view.installing();
            if !self.memory.states(place.area).claim_zero(place.granule) {
                return Flow::Continue(());
            }
            let done = self.install(&gate, place, 1, Content::Zeros);
            drop(gate);
            match done {
                Ok(0) => self.blocked(),
                Ok(_) => return Flow::Continue(()),
                Err(error) => return Flow::Break(error),
            }
        }
    }
}
