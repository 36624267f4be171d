//! Where the content of a granule at the freeze point is.

use std::io;
use std::ops::Range;

use page_units::{ByteLen, PageCount};

use super::error::FrozenError;
use super::freeze::Freeze;
use super::owner::By;
use super::zone::Zone;
use crate::memory::holder::{Fetch, MissingContent};
use crate::memory::states::{State, StateMap};
use crate::memory::{Memory, Place};

/// Where the content of a granule at the freeze point is.
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

impl Freeze {
    /// For each granule, where its content is, unless it is saved already: then the answer means nothing.
    pub(crate) fn locate(&self, number: usize, granules: Range<usize>) -> Result<Vec<ContentAt>, FrozenError> {
        match self.owner.by() {
            By::Freeze(_) => {
                let of = |exists| if exists { ContentAt::Memory } else { ContentAt::Zero };
                Ok(self.existed(number, granules)?.into_iter().map(of).collect())
            }
            By::Engine { memory, fetch } => self.in_engine(number, granules, memory, fetch),
        }
    }

    /// By the engine's page states. What is Missing there was Missing at the freeze point; what became Present since
    /// then came write-protected, and is what the source has until it is saved.
    ///
    /// The states alone do not tell. A page that is Present can be missing, if it was given back before the freeze point
    /// (see `Memory::serve`). One that is Missing, Zero or Removed can be there: in shared memory if somebody else has put it
    /// into the file, in private memory if it was given back lazily (`MADV_FREE`) and written to again. So the states are
    /// read first, and then it is looked up what exists.
    fn in_engine(
        &self,
        number: usize,
        granules: Range<usize>,
        memory: &Memory,
        fetch: &dyn Fetch,
    ) -> Result<Vec<ContentAt>, FrozenError> {
        let (zone, all) = (&self.zones[number], memory.states(number));
        let states: Vec<State> = granules.clone().map(|granule| all.get(granule).state).collect();
        let exists = self.exists(number, granules.clone())?;
        let of = |granule: usize, state: State, exists: bool| {
            let place = Place { area: number, granule };
            let shared = zone.region.shared;
            Ok(match state {
                _ if zone.saved.saved(granule) => ContentAt::Zero,
                State::Poisoned => return Err(FrozenError::Poisoned(zone.pages(granule, 1))),
                State::InFlight => ContentAt::Soon,
                State::Present if exists => ContentAt::Memory,
                // It may have come since we looked.
                State::Present if shared && self.known.was_whole(number) && !zone.saved.may_change(granule) => {
                    return lost(zone, all, granule);
                }
                State::Present => ContentAt::Zero,
                // Nobody has claimed it: it stays where it is.
                State::Zero | State::Removed if exists && !shared => ContentAt::Memory,
                State::Zero | State::Removed if exists => match fetch.missing(place, true) {
                    MissingContent::Zero => ContentAt::Zero,
                    MissingContent::Mapped => ContentAt::Memory,
                    MissingContent::Source | MissingContent::Soon => ContentAt::Soon,
                },
                State::Zero | State::Removed => ContentAt::Zero,
                State::Missing => match fetch.missing(place, exists && shared) {
                    MissingContent::Zero => ContentAt::Zero,
                    MissingContent::Source => ContentAt::Source,
                    MissingContent::Mapped => ContentAt::Memory,
                    MissingContent::Soon => ContentAt::Soon,
                },
            })
        };
        let each = granules.zip(states).zip(exists);
        each.map(|((granule, state), exists)| of(granule, state, exists)).collect()
    }

    /// For each granule, whether it existed at the freeze point, unless it is saved already. A granule that came into
    /// being since then was a hole, which its first toucher has marked.
    fn existed(&self, number: usize, granules: Range<usize>) -> Result<Vec<bool>, FrozenError> {
        let zone = &self.zones[number];
        if zone.region.shared {
            let pages = self.known.existed(zone.pages(granules.start, granules.len()));
            return Ok(by_granule(zone, &pages));
        }
        self.exists(number, granules)
    }

    /// For each granule, whether it exists now.
    fn exists(&self, number: usize, granules: Range<usize>) -> Result<Vec<bool>, FrozenError> {
        let zone = &self.zones[number];
        let start = zone.addr(granules.start);
        let run = zone.pages(granules.start, granules.len());
        let pages: io::Result<Vec<bool>> = if zone.region.shared {
            self.populated.in_file(number, run).map(|runs| {
                let mut pages = vec![false; ByteLen(run.pages.0).get()];
                for page in runs.iter().flat_map(|there| there.intersect(run).iter()) {
                    pages[ByteLen((page - run.first).0).get()] = true;
                }
                pages
            })
        } else {
            self.populated.page_table().exist(start, ByteLen(run.pages.0).get())
        };
        let pages = pages.map_err(|error| FrozenError::io("looking up which pages exist", start, &error))?;
        Ok(by_granule(zone, &pages))
    }
}

fn by_granule(zone: &Zone, pages: &[bool]) -> Vec<bool> {
    let per = ByteLen(zone.granule.pages().0).get();
    pages.chunks(per).map(|pages| pages.iter().any(|&there| there)).collect()
}

/// A page is not there that was there at the freeze point, and nobody has told us.
fn lost(zone: &Zone, states: &StateMap, granule: usize) -> Result<ContentAt, FrozenError> {
    if states.get(granule).state != State::Present {
        return Ok(ContentAt::Soon);
    }
    let start = zone.addr(granule);
    Err(FrozenError::Discarded { start, end: start + zone.len_of(1) })
}

/// How much is taken from a source at a time: its pages can't be written to meanwhile.
pub(crate) fn fetched_at_a_time(zone: &Zone) -> usize {
    ByteLen(PageCount(64).0 / zone.granule.pages().0).get().max(1)
}
