//! What guest memory is made of.

use page_units::PageSize;

use crate::sys::abi::Features;

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
