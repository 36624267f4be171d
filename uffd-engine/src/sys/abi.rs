//! The kernel's userfaultfd interface: `include/uapi/linux/userfaultfd.h` of Linux 6.8.
//!
//! Own definitions, since the headers of a build machine may be years older than the kernel the program runs on.

use std::mem::size_of;

bitflags::bitflags! {
    /// What a kernel's userfaultfd can do (`UFFD_FEATURE_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Features: u64 {
        /// Write-protect faults. Linux 5.7.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// An event when memory is given back with `madvise`. Linux 4.11.
        const EVENT_REMOVE = 1 << 3;
        /// Missing faults in hugetlbfs. Linux 4.11.
        const MISSING_HUGETLBFS = 1 << 4;
        /// Missing faults in shared memory. Linux 4.11.
        const MISSING_SHMEM = 1 << 5;
        /// An event when memory is unmapped. Linux 4.11.
        const EVENT_UNMAP = 1 << 6;
        /// The faulting thread's id. Linux 4.14.
        const THREAD_ID = 1 << 8;
        /// Minor faults in hugetlbfs. Linux 5.13.
        const MINOR_HUGETLBFS = 1 << 9;
        /// Minor faults in shared memory. Linux 5.14.
        const MINOR_SHMEM = 1 << 10;
        /// Write-protect faults in hugetlbfs and shared memory. Linux 5.19.
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Unpopulated pages can be write-protected. Linux 6.4.
        const WP_UNPOPULATED = 1 << 13;
        /// `UFFDIO_POISON`. Linux 6.6.
        const POISON = 1 << 14;
        /// Write protection that resolves itself. Linux 6.7.
        const WP_ASYNC = 1 << 15;
        /// `UFFDIO_MOVE`. Linux 6.8.
        const MOVE = 1 << 16;
    }
}

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Api {
    pub(crate) api: u64,
    pub(crate) features: u64,
    pub(crate) ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    /// Bytes done, or a negative errno.
    pub(crate) copy: i64,
}

/// `struct uffdio_zeropage`, `uffdio_continue` and `uffdio_poison`: they look the same.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Fill {
    pub(crate) range: Range,
    pub(crate) mode: u64,
    /// Bytes done, or a negative errno.
    pub(crate) done: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct WriteProtect {
    pub(crate) range: Range,
    pub(crate) mode: u64,
}

/// `struct uffd_msg`, with the payload of the events that are used here side by side.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Message {
    pub(crate) event: u8,
    pub(crate) reserved: [u8; 7],
    /// Page fault: flags. Remove, unmap: first byte.
    pub(crate) word0: u64,
    /// Page fault: address. Remove, unmap: end.
    pub(crate) word1: u64,
    /// Page fault: thread id.
    pub(crate) word2: u64,
}

pub(crate) const UFFD_API: u64 = 0xaa;
pub(crate) const UFFD_API_IOCTL: u64 = ioc(READ | WRITE, 0xaa, 0x3f, size_of::<Api>());
pub(crate) const UFFDIO_COPY: u64 = ioc(READ | WRITE, 0xaa, 0x03, size_of::<Copy>());
pub(crate) const UFFDIO_ZEROPAGE: u64 = ioc(READ | WRITE, 0xaa, 0x04, size_of::<Fill>());
pub(crate) const UFFDIO_WRITEPROTECT: u64 = ioc(READ | WRITE, 0xaa, 0x06, size_of::<WriteProtect>());
pub(crate) const UFFDIO_CONTINUE: u64 = ioc(READ | WRITE, 0xaa, 0x07, size_of::<Fill>());
pub(crate) const UFFDIO_POISON: u64 = ioc(READ | WRITE, 0xaa, 0x08, size_of::<Fill>());
/// On `/dev/userfaultfd`. Linux 6.1.
pub(crate) const USERFAULTFD_IOC_NEW: u64 = ioc(0, 0xaa, 0x00, 0);

pub(crate) const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const UFFD_EVENT_REMOVE: u8 = 0x15;
pub(crate) const UFFD_EVENT_UNMAP: u8 = 0x16;

pub(crate) const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub(crate) const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;
/// Linux 6.4.
pub(crate) const UFFDIO_CONTINUE_MODE_WP: u64 = 1 << 1;
pub(crate) const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
pub(crate) const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

pub(crate) const WRITE: u64 = 1;
pub(crate) const READ: u64 = 2;

/// `_IOC` of `include/uapi/asm-generic/ioctl.h`.
pub(crate) const fn ioc(direction: u64, group: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | group << 8 | number
}

const _: () = {
    assert!(size_of::<Api>() == 24);
    assert!(size_of::<Copy>() == 40);
    assert!(size_of::<Fill>() == 32);
    assert!(size_of::<WriteProtect>() == 24);
    assert!(size_of::<Message>() == 32);
    assert!(UFFD_API_IOCTL == 0xc018_aa3f);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(UFFDIO_WRITEPROTECT == 0xc018_aa06);
    assert!(UFFDIO_CONTINUE == 0xc020_aa07);
    assert!(UFFDIO_POISON == 0xc020_aa08);
    assert!(USERFAULTFD_IOC_NEW == 0xaa00);
    // What the build machine's header does know must agree.
    assert!(Features::EVENT_REMOVE.bits() == userfaultfd::FeatureFlags::EVENT_REMOVE.bits());
    assert!(Features::EVENT_UNMAP.bits() == userfaultfd::FeatureFlags::EVENT_UNMAP.bits());
    assert!(userfaultfd::RegisterMode::MINOR.bits() == 1 << 2);
    assert!(Features::MISSING_SHMEM.bits() == userfaultfd::FeatureFlags::MISSING_SHMEM.bits());
    assert!(Features::MISSING_HUGETLBFS.bits() == userfaultfd::FeatureFlags::MISSING_HUGETLBFS.bits());
};
