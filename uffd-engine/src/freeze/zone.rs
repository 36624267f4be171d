//! A region of frozen memory, and which part of it is saved.

use std::sync::atomic::AtomicBool;

use page_units::{ByteLen, HostAddr, PageCount, PageRun, PageSize};

use super::saved::Saved;
use crate::memory::region::Region;
use crate::sys::read::Reading;

/// A region, and which part of it is saved.
#[derive(Debug)]
pub(crate) struct Zone {
    pub(crate) region: Region,
    pub(crate) saved: Saved,
    pub(crate) granule: PageSize,
    pub(crate) reading: Reading,
    /// Whether the freeze has registered it, and nobody else.
    pub(crate) registered: AtomicBool,
}

impl Zone {
    pub(crate) fn addr(&self, granule: usize) -> HostAddr {
        self.region.start + self.len_of(granule)
    }

    pub(crate) fn len_of(&self, granules: usize) -> ByteLen {
        ByteLen(granules as u64 * self.granule.bytes().0)
    }

    pub(crate) fn pages(&self, first: usize, granules: usize) -> PageRun {
        let per = self.granule.pages().0;
        let page = self.region.run.first + PageCount(first as u64 * per);
        PageRun::new(self.region.run.block, page, PageCount(granules as u64 * per))
    }
}
