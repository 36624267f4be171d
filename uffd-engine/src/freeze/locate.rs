//! Where the content of a granule at the freeze point is to be had.

use page_units::{ByteLen, PageCount};

use super::freeze::{Shared, Zone};
use super::frozen::FrozenError;
use super::owner::Owner;
use super::saver::page_table_error;
use crate::memory::backing::Backing;
use crate::memory::holder::{Fetch, MissingContent};
use crate::memory::states::State;
use crate::memory::{Memory, Place};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContentAt {
    /// In the memory itself.
    Memory,
    /// Nowhere: it is zero.
    Zero,
    /// In the source that the memory is loaded from; the memory does not have it.
    Source,
    /// Not known yet: an install is under way, or was asked for.
    Soon,
}

impl Shared {
    /// For each granule, where its content is, unless it is saved already: then the answer means nothing.
    pub(crate) fn whereabouts(
        &self,
        number: usize,
        granules: std::ops::Range<usize>,
    ) -> Result<Vec<ContentAt>, FrozenError> {
        let zone = &self.zones[number];
        match &self.owner {
            Owner::Freeze { .. } => {
                let of = |exists| if exists { ContentAt::Memory } else { ContentAt::Zero };
                Ok(self.existing(zone, granules)?.into_iter().map(of).collect())
            }
            Owner::Engine { memory, fetch } => self.in_engine(zone, number, granules, memory, &**fetch),
        }
    }

    /// By the engine's page states. What is Missing there was Missing at the freeze point; what became Present since
    /// then came write-protected, and is what the source has until it is saved.
    fn in_engine(
        &self,
        zone: &Zone,
        number: usize,
        granules: std::ops::Range<usize>,
        memory: &Memory,
        fetch: &dyn Fetch,
    ) -> Result<Vec<ContentAt>, FrozenError> {
        let states: Vec<State> = granules.clone().map(|granule| memory.states(number).get(granule).state).collect();
        // A page that is Present can be missing all the same, if it was given back before the freeze point: see
        // `Memory::serve`. In this order: what is Present was mapped before.
        let exists = if zone.region.shared || !states.contains(&State::Present) {
            vec![true; granules.len()]
        } else {
            self.existing(zone, granules.clone())?
        };
        // In shared memory the file may hold what nobody has mapped yet.
        let in_file = if zone.region.shared && states.contains(&State::Missing) {
            self.existing(zone, granules.clone())?
        } else {
            vec![false; granules.len()]
        };
        granules
            .clone()
            .zip(states)
            .map(|(granule, state)| {
                let place = Place { area: number, granule };
                let at = granule - granules.start;
                Ok(match state {
                    _ if zone.saved.saved(granule) => ContentAt::Zero,
                    State::Present if exists[at] => ContentAt::Memory,
                    State::Present | State::Zero | State::Removed => ContentAt::Zero,
                    State::InFlight => ContentAt::Soon,
                    State::Poisoned => return Err(FrozenError::Poisoned(zone.pages(granule, 1))),
                    State::Missing => match fetch.missing(place, in_file[at]) {
                        MissingContent::Zero => ContentAt::Zero,
                        MissingContent::Source => ContentAt::Source,
                        MissingContent::Mapped => ContentAt::Memory,
                        MissingContent::Soon => ContentAt::Soon,
                    },
                })
            })
            .collect()
    }

    /// For each granule, whether it existed at the freeze point, unless it is saved already. A granule that came into
    /// being since then was a hole, which its first toucher has marked.
    fn existing(&self, zone: &Zone, granules: std::ops::Range<usize>) -> Result<Vec<bool>, FrozenError> {
        let per = ByteLen(zone.granule.pages().0).get();
        let run = zone.pages(granules.start, granules.len());
        let pages = if zone.region.backing == Backing::Anonymous || !zone.region.shared {
            let start = zone.addr(granules.start);
            self.page_table.exist(start, granules.len() * per).map_err(|error| page_table_error(start, &error))?
        } else {
            self.in_file(run)
        };
        Ok(pages.chunks(per).map(|pages| pages.iter().any(|&there| there)).collect())
    }
}

/// So much is taken from a source at a time: its pages can't be written to meanwhile.
pub(crate) fn fetched_at_a_time(zone: &Zone) -> usize {
    ByteLen(PageCount(64).0 / zone.granule.pages().0).get().max(1)
}
