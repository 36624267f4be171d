//! What is known of the content: the state of each granule, for all who see it.
//!
//! The other half of a [`Memory`](super::Memory) is its [`View`](super::View): the descriptor, the addresses and the
//! gate. Today one view shows one fill.

use std::io;

use super::area::Area;
use super::states::StateMap;

/// The states of the granules, area by area.
#[derive(Debug)]
pub(crate) struct Fill {
    areas: Box<[StateMap]>,
}

impl Fill {
    /// Of areas in which nothing is there yet.
    pub(crate) fn missing(areas: &[Area]) -> io::Result<Fill> {
        Fill::new(areas, StateMap::new)
    }

    /// Of areas whose content is the memory itself: nothing is missing.
    #[expect(dead_code, reason = "for memory that is frozen without having been loaded")]
    pub(crate) fn present(areas: &[Area]) -> io::Result<Fill> {
        Fill::new(areas, StateMap::present_from_the_start)
    }

    fn new(areas: &[Area], map: impl Fn(usize) -> io::Result<StateMap>) -> io::Result<Fill> {
        let areas = areas.iter().map(|area| map(area.granules)).collect::<io::Result<_>>()?;
        Ok(Fill { areas })
    }

    /// The states of one area.
    pub(crate) fn of(&self, area: usize) -> &StateMap {
        &self.areas[area]
    }
}
