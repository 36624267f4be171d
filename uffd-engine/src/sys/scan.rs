//! Asking the page table where memory is: `PAGEMAP_SCAN` of `include/uapi/linux/fs.h`, Linux 6.7.

use std::fs::File;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use page_source::HostAddr;

use super::abi::{READ, WRITE, ioc};

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGEMAP_SCAN: u64 = ioc(READ | WRITE, b'f' as u64, 16, size_of::<Scan>());

const _: () = {
    assert!(size_of::<Scan>() == 96 && size_of::<Found>() == 24);
    assert!(PAGEMAP_SCAN == 0xC060_6610);
};

/// The first page between two addresses that is there, or is swapped out; `pagemap` is `/proc/self/pagemap`.
///
/// # Errors
/// `ENOTTY` from a kernel that can't tell.
pub(crate) fn first_present(pagemap: &File, start: HostAddr, end: HostAddr) -> nix::Result<Option<HostAddr>> {
    let mut found = Found::default();
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: start.0,
        end: end.0,
        vec: (&raw mut found) as u64,
        vec_len: 1,
        max_pages: 1,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        return_mask: PAGE_IS_PRESENT,
        ..Scan::default()
    };
    // SAFETY: the structure this ioctl reads and writes, with the address of one `page_region`, which outlives the call;
    // without PM_SCAN_WP_MATCHING it changes no page.
    let regions = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    Ok((Errno::result(regions)? > 0).then_some(HostAddr(found.start)))
}
