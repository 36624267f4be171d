//! Pieces of guest memory, and what they are made of.

use std::any::Any;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use page_units::{ByteLen, FileOffset, HostAddr, Layout, PAGE_SIZE, PageCount, PageIndex, PageRun};

use userfaultfd::RegisterMode;

use super::backing::Backing;
use super::mapping::Mapping;
use crate::StartError;
use crate::sys::memory::resident;

/// A range of virtual memory that holds (a part of) a RAM block.
#[derive(Clone, Debug)]
pub struct Region {
    pub(crate) start: HostAddr,
    pub(crate) run: PageRun,
    pub(crate) backing: Backing,
    pub(crate) shared: bool,
    pub(crate) alias: Option<HostAddr>,
    /// Memory of another process: its address means nothing here.
    pub(crate) foreign: bool,
    /// The file behind it, and where in the file it begins.
    pub(crate) file: Option<(Arc<File>, FileOffset)>,
    /// What there is of it, where that is known.
    limit: Option<ByteLen>,
    /// What keeps it mapped.
    owner: Option<Arc<dyn Any + Send + Sync>>,
}

impl Region {
    /// The beginning of a mapping holds the pages `run`. The region keeps it mapped.
    #[must_use]
    pub fn of(mapping: &Arc<Mapping>, run: PageRun) -> Region {
        let owner: Arc<dyn Any + Send + Sync> = Arc::<Mapping>::clone(mapping);
        let backing = mapping.backing();
        let region = Region::at(mapping.addr(), run, backing).with_owner(owner);
        let file = mapping.file().map(|file| (Arc::clone(file), FileOffset(0)));
        Region { shared: backing != Backing::Anonymous, limit: Some(mapping.len()), file, ..region }
    }

    /// The memory at `start` of this process holds the pages `run`.
    ///
    /// # Safety
    /// For as long as the region or an engine or a freeze of it exists (or its [owner](Region::with_owner) is kept): from
    /// `start` on the length of `run` is mapped, readable and writable, and of this backing, nothing else is mapped over
    /// it, and no Rust reference to it exists: the engine changes it (pages that nobody has seen yet, and those that are
    /// given back with [`Engine::discard`](crate::Engine::discard)), and a freeze reads it.
    #[expect(unsafe_code, reason = "the caller vouches for raw memory")]
    #[must_use]
    pub unsafe fn from_raw(start: HostAddr, run: PageRun, backing: Backing) -> Region {
        Region::at(start, run, backing)
    }

    /// The memory at `start` of another process holds the pages `run`. Nothing here ever accesses that address: only a
    /// descriptor that was [handed over](crate::Descriptor::handed_over) can serve it.
    #[must_use]
    pub fn foreign(start: HostAddr, run: PageRun, backing: Backing) -> Region {
        Region { foreign: true, ..Region::at(start, run, backing) }
    }

    fn at(start: HostAddr, run: PageRun, backing: Backing) -> Region {
        let shared = backing == Backing::Memfd;
        Region { start, run, backing, shared, alias: None, foreign: false, file: None, limit: None, owner: None }
    }

    /// Keeps something, usually what owns the mapping, for as long as the region exists, and what serves or freezes it.
    #[must_use]
    pub fn with_owner(mut self, owner: Arc<dyn Any + Send + Sync>) -> Region {
        self.owner = Some(owner);
        self
    }

    /// Whether the mapping is `MAP_SHARED`: a memfd by default, nothing else.
    #[must_use]
    pub fn with_shared(mut self, shared: bool) -> Region {
        self.shared = shared;
        self
    }

    /// Names a second, never registered mapping of the same shared memory. Huge pages are then filled through it and
    /// become visible when they are whole, with no copy between.
    ///
    /// # Safety
    /// For as long as the region or an engine of it exists (or its [owner](Region::with_owner) is kept): from `alias` on the
    /// length of the region is mapped, and writable, and no Rust reference to it exists.
    #[expect(unsafe_code, reason = "the caller vouches for raw memory")]
    #[must_use]
    pub unsafe fn with_alias(mut self, alias: HostAddr) -> Region {
        self.alias = Some(alias);
        self
    }

    /// The file behind it, and where in the file it begins. Shared memory needs it to be frozen: the file tells which pages
    /// exist, including those that other processes have filled.
    ///
    /// The promise that a snapshot ends if the file is punched or written to past the memory covers files that hold these
    /// regions and nothing else; of other files it is not noticed what happens to pages in the first moments, which have
    /// not been looked up yet.
    #[must_use]
    pub fn with_file(mut self, file: Arc<File>, offset: FileOffset) -> Region {
        self.file = Some((file, offset));
        self
    }

    /// Whether the kernel merges equal pages of it (KSM), if it is asked to.
    pub(crate) fn may_be_merged(&self) -> bool {
        !self.shared && self.backing != Backing::Hugetlb
    }

    /// Whether it is shared memory of small pages.
    pub(crate) fn is_shared_memfd(&self) -> bool {
        self.shared && self.backing == Backing::Memfd
    }

    /// What an engine registers it for.
    pub(crate) fn mode(&self) -> RegisterMode {
        match self.backing {
            Backing::Anonymous => RegisterMode::MISSING,
            Backing::Hugetlb if !self.shared => RegisterMode::MISSING,
            Backing::Memfd | Backing::Hugetlb => RegisterMode::MISSING | RegisterMode::MINOR,
        }
    }

    pub(crate) fn len(&self) -> ByteLen {
        self.run.len()
    }

    pub(crate) fn range(&self) -> Range<HostAddr> {
        self.start..self.start + self.len()
    }

    pub(crate) fn granules(&self) -> usize {
        ByteLen(self.len().0 / self.backing.granule().bytes().0).get()
    }

    fn problem(&self, layout: &Layout) -> Option<String> {
        let granule = self.backing.granule();
        if self.run.is_empty() {
            return Some("it is empty".into());
        }
        if !layout.contains(self.run) {
            return Some(format!("{} is outside the RAM blocks of the source", self.run));
        }
        let whole = |bytes: u64| bytes.is_multiple_of(granule.bytes().0);
        let first = self.run.first.byte_offset().0;
        if !(whole(self.start.0) && whole(self.len().0) && whole(first)) {
            return Some(format!("address, length and offset must be multiples of {} bytes", granule.bytes()));
        }
        if self.start.checked_add(self.len()).is_none() {
            return Some("it wraps around the address space".into());
        }
        if self.limit.is_some_and(|limit| self.len() > limit) {
            return Some("the mapping is shorter than its pages".into());
        }
        if self.alias.is_some_and(|alias| !alias.0.is_multiple_of(PAGE_SIZE)) {
            return Some("its alias is not aligned to a page".into());
        }
        None
    }
}

/// The regions, checked: inside the layout, aligned, disjoint in memory and in content.
pub(crate) fn check(regions: &[Region], layout: &Layout) -> Result<(), StartError> {
    let error =
        |region: &Region, reason: String| Err(StartError::Region { start: region.start, length: region.len(), reason });
    for (i, region) in regions.iter().enumerate() {
        if let Some(reason) = region.problem(layout) {
            return error(region, reason);
        }
        for other in &regions[..i] {
            let (a, b) = (region.range(), other.range());
            if a.start < b.end && b.start < a.end {
                return error(region, format!("it overlaps the region at {}", other.start));
            }
            if !region.run.intersect(other.run).is_empty() {
                return error(region, format!("{} is in the region at {} already", region.run, other.start));
            }
        }
    }
    Ok(())
}

/// Refuses memory of another process, where only memory of this one will do.
pub(crate) fn check_local(regions: &[Region]) -> Result<(), StartError> {
    match regions.iter().find(|region| region.foreign) {
        None => Ok(()),
        Some(region) => {
            let reason = "it is in another process: that process has to hand its userfaultfd over".into();
            Err(StartError::Region { start: region.start, length: region.len(), reason })
        }
    }
}

/// Refuses private memory of this process that is there already, all of it by the look of both ends: nothing of the
/// source would ever get into it. (Of shared memory it may be right what is there.)
pub(crate) fn check_unseen(regions: &[Region]) -> Result<(), StartError> {
    for region in regions.iter().filter(|region| !region.shared && region.backing != Backing::Memfd) {
        let last = region.range().end.0 - PAGE_SIZE;
        if resident(region.start) && resident(HostAddr(last)) {
            let reason = "its pages are there already (by mlockall, MAP_POPULATE, or because somebody has touched them), \
                          and would stay as they are";
            return Err(StartError::Region { start: region.start, length: region.len(), reason: reason.into() });
        }
    }
    Ok(())
}

/// `page` as a granule of a region that begins with page `first`.
pub(crate) fn granule_of(region: &Region, page: PageIndex) -> usize {
    let pages: PageCount = page - region.run.first;
    ByteLen(pages.0 / region.backing.granule().pages().0).get()
}

#[cfg(test)]
mod tests {
    use page_units::{BlockId, PageSize, RamBlock};

    use super::*;

    #[test]
    fn impossible_regions_are_refused() {
        let layout = Layout::new(vec![RamBlock::new("a", ByteLen(4 << 20), PageSize::SMALL).unwrap()]).unwrap();
        let run = |first, pages| PageRun::new(BlockId(0), PageIndex(first), PageCount(pages));
        let small = |start, run| Region::foreign(HostAddr(start), run, Backing::Anonymous);
        let ok = |regions: &[Region]| check(regions, &layout).is_ok();
        assert!(ok(&[small(0x10000, run(0, 512)), small(0x400_0000, run(512, 512))]));
        assert!(!ok(&[small(0x10000, run(0, 1025))]), "outside the block");
        assert!(!ok(&[small(0x10001, run(0, 1))]), "unaligned");
        assert!(!ok(&[small(0x10000, run(0, 0))]), "empty");
        assert!(!ok(&[small(0x10000, run(0, 2)), small(0x11000, run(2, 2))]), "overlaps in memory");
        assert!(!ok(&[small(0x10000, run(0, 2)), small(0x90000, run(1, 2))]), "overlaps in content");
        assert!(!ok(&[small(u64::MAX - 0xfff, run(0, 2))]), "wraps");
        let huge = |start, run| Region::foreign(HostAddr(start), run, Backing::Hugetlb);
        assert!(ok(&[huge(2 << 20, run(0, 512))]) && !ok(&[huge(0x1000, run(0, 512))]));
    }
}
