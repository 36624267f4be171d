//! Pieces of guest memory, and what they are made of.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use page_units::{ByteLen, FileOffset, HostAddr, Layout, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSize};

use userfaultfd::RegisterMode;

use crate::StartError;
use crate::sys::abi::Features;
use crate::sys::memory::resident;

/// What a region is made of: it decides which install operations work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// `MAP_PRIVATE | MAP_ANONYMOUS`. Missing faults, `UFFDIO_COPY` and `UFFDIO_ZEROPAGE`.
    Anonymous,
    /// A memfd or tmpfs file, shared or private. Missing and minor faults: `UFFDIO_COPY` fills holes,
    /// `UFFDIO_CONTINUE` maps what the file holds already.
    Memfd,
    /// Huge pages of 2 MiB, shared or private. No `UFFDIO_ZEROPAGE`: zeros are copied.
    Hugetlb,
}

impl Backing {
    /// What one install covers.
    #[must_use]
    pub const fn granule(self) -> PageSize {
        match self {
            Backing::Anonymous | Backing::Memfd => PageSize::SMALL,
            Backing::Hugetlb => PageSize::HUGE,
        }
    }

    pub(crate) const fn features(self) -> Features {
        match self {
            Backing::Anonymous => Features::empty(),
            Backing::Memfd => Features::MISSING_SHMEM.union(Features::MINOR_SHMEM),
            Backing::Hugetlb => Features::MISSING_HUGETLBFS.union(Features::MINOR_HUGETLBFS),
        }
    }
}

/// A range of virtual memory that holds (a part of) a RAM block.
#[derive(Clone, Debug)]
pub struct Region {
    pub(crate) start: HostAddr,
    pub(crate) run: PageRun,
    pub(crate) backing: Backing,
    pub(crate) shared: bool,
    pub(crate) alias: Option<HostAddr>,
    pub(crate) file: Option<(Arc<File>, FileOffset)>,
}

impl Region {
    /// The memory at `start` (in the process that owns it) holds the pages `run`.
    ///
    /// For memory of this process the caller promises, for as long as the engine lives: it is mapped, of this backing
    /// and of at least this length, and nobody else maps over it. The engine changes it only through the kernel, and
    /// only pages that nobody has seen yet: what is there when it starts stays as it is.
    #[must_use]
    pub fn new(start: HostAddr, run: PageRun, backing: Backing) -> Region {
        Region { start, run, backing, shared: backing == Backing::Memfd, alias: None, file: None }
    }

    /// Whether the mapping is `MAP_SHARED`: a memfd by default, nothing else.
    #[must_use]
    pub fn with_shared(mut self, shared: bool) -> Region {
        self.shared = shared;
        self
    }

    /// A second, writable and never registered mapping in this process of the same shared memory, as long as the
    /// region. Huge pages are then filled through it and become visible when they are whole, with no copy between.
    ///
    /// The caller promises that it stays mapped while the engine lives.
    #[must_use]
    pub fn with_alias(mut self, alias: HostAddr) -> Region {
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
    use page_units::{BlockId, RamBlock};

    use super::*;

    #[test]
    fn impossible_regions_are_refused() {
        let layout = Layout::new(vec![RamBlock::new("a", ByteLen(4 << 20), PageSize::SMALL).unwrap()]).unwrap();
        let run = |first, pages| PageRun::new(BlockId(0), PageIndex(first), PageCount(pages));
        let small = |start, run| Region::new(HostAddr(start), run, Backing::Anonymous);
        let ok = |regions: &[Region]| check(regions, &layout).is_ok();
        assert!(ok(&[small(0x10000, run(0, 512)), small(0x400_0000, run(512, 512))]));
        assert!(!ok(&[small(0x10000, run(0, 1025))]), "outside the block");
        assert!(!ok(&[small(0x10001, run(0, 1))]), "unaligned");
        assert!(!ok(&[small(0x10000, run(0, 0))]), "empty");
        assert!(!ok(&[small(0x10000, run(0, 2)), small(0x11000, run(2, 2))]), "overlaps in memory");
        assert!(!ok(&[small(0x10000, run(0, 2)), small(0x90000, run(1, 2))]), "overlaps in content");
        assert!(!ok(&[small(u64::MAX - 0xfff, run(0, 2))]), "wraps");
        let huge = |start, run| Region::new(HostAddr(start), run, Backing::Hugetlb);
        assert!(ok(&[huge(2 << 20, run(0, 512))]) && !ok(&[huge(0x1000, run(0, 512))]));
    }
}
