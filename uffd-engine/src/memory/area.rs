//! A region with the states of its granules, and the arithmetic of granules.

use std::sync::Arc;

use page_units::{BlockId, ByteLen, HostAddr, PageCount, PageIndex, PageRun};

use super::region::{self, Region};
use super::states::StateMap;

/// A region with the states of its granules.
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) region: Region,
    /// Of the RAM block, for messages.
    pub(crate) name: Arc<str>,
    pub(crate) states: StateMap,
    /// 4 KiB pages per granule.
    pub(crate) granule: PageCount,
}

impl Area {
    /// The address of a granule.
    pub(crate) fn addr(&self, granule: usize) -> HostAddr {
        self.region.start + self.len_of(granule)
    }

    /// The length of so many granules.
    pub(crate) fn len_of(&self, granules: usize) -> ByteLen {
        ByteLen(granules as u64 * self.granule.to_bytes().0)
    }

    /// The first page of a granule.
    pub(crate) fn page(&self, granule: usize) -> PageIndex {
        self.region.run.first + PageCount(granule as u64 * self.granule.0)
    }

    /// The pages of some granules.
    pub(crate) fn pages(&self, first: usize, granules: usize) -> PageRun {
        PageRun::new(self.block(), self.page(first), PageCount(granules as u64 * self.granule.0))
    }

    /// The granule that holds a page.
    pub(crate) fn granule_of(&self, page: PageIndex) -> usize {
        region::granule_of(&self.region, page)
    }

    pub(crate) fn block(&self) -> BlockId {
        self.region.run.block
    }

    /// Whether one page is one granule.
    pub(crate) fn small(&self) -> bool {
        self.granule.0 == 1
    }
}
