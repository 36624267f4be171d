//! What the micro-benchmarks (`benches/`) need of the inside. Not part of the interface.

use std::io;
use std::ops::Range;

use crate::memory::states::{State, StateMap};

/// A state map, with the steps of a load as the engine takes them.
#[derive(Debug)]
pub struct States(StateMap);

impl States {
    /// A map of granules, all of them missing.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(granules: usize) -> io::Result<States> {
        Ok(States(StateMap::new(granules)?))
    }

    /// Takes a granule through a demand fault: requested, claimed, present. `false` if it was not missing.
    #[must_use]
    pub fn demand(&self, granule: usize) -> bool {
        let missing = self.0.get_to_change(granule).state == State::Missing;
        let installed = missing && self.0.request(granule, true).is_some() && self.0.claim(granule);
        if installed {
            self.0.settle(granule, State::Present);
        }
        installed
    }

    /// Takes a run of granules through a background request. Answers how many of them were installed.
    #[must_use]
    pub fn background(&self, granules: Range<usize>) -> usize {
        let requested = granules.clone().filter(|&granule| self.0.request(granule, false).is_some()).count();
        let claimed: Vec<usize> = granules.filter(|&granule| self.0.claim(granule)).collect();
        for &granule in &claimed {
            self.0.settle(granule, State::Present);
        }
        requested.min(claimed.len())
    }

    /// Marks a granule as zero. `false` if it was not missing.
    #[must_use]
    pub fn zero(&self, granule: usize) -> bool {
        self.0.mark_zero(granule).state == State::Missing
    }

    /// Counts the runs of granules that are present.
    #[must_use]
    pub fn present_runs(&self) -> usize {
        self.0.present().count()
    }
}
