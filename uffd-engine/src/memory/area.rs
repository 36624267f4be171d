//! One region as the engine sees it: its granules, their addresses and their pages.

use std::sync::Arc;

use page_units::{BlockId, ByteLen, HostAddr, PageCount, PageIndex, PageRun};

use super::region::{self, Region};

/// A region in granules.
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) region: Region,
    /// Of the RAM block, for messages.
    pub(crate) name: Arc<str>,
    /// 4 KiB pages per granule.
    pub(crate) granule: PageCount,
    /// How many granules it has.
    pub(crate) granules: usize,
}

impl Area {
    pub(crate) fn new(region: Region, name: Arc<str>) -> Area {
        Area { granule: region.backing.granule().pages(), granules: region.granules(), name, region }
    }

    /// The address of a granule.
    pub(crate) fn addr(&self, granule: usize) -> HostAddr {
        self.region.start + self.len_of(granule)
    }

    /// The length of a number of granules.
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
