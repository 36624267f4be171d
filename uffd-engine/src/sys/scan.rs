//! Asking the page table where memory is: `PAGEMAP_SCAN` of `include/uapi/linux/fs.h`, Linux 6.7.

use std::fs::File;
use std::mem::size_of;
use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use page_units::HostAddr;

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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

impl Found {
    pub(crate) const NOTHING: Found = Found { start: 0, end: 0, categories: 0 };

    pub(crate) fn range(&self) -> Range<HostAddr> {
        HostAddr(self.start)..HostAddr(self.end)
    }
}

/// `PAGE_IS_PRESENT`
pub(crate) const PRESENT: u64 = 1 << 3;
/// `PAGE_IS_SWAPPED`
pub(crate) const SWAPPED: u64 = 1 << 4;
const PAGEMAP_SCAN: u64 = ioc(READ | WRITE, b'f' as u64, 16, size_of::<Scan>());

const _: () = {
    assert!(size_of::<Scan>() == 96 && size_of::<Found>() == 24);
    assert!(PAGEMAP_SCAN == 0xC060_6610);
};

/// Ranges of pages between two addresses that are of one of `categories`, as many as fit, of at most `most` pages (0:
/// any number), and where the search has ended; `pagemap` is `/proc/self/pagemap`.
///
/// # Errors
/// `ENOTTY` from a kernel that can't tell.
pub(crate) fn scan<'a>(
    pagemap: &File,
    start: HostAddr,
    end: HostAddr,
    categories: u64,
    found: &'a mut [Found],
    most: u64,
) -> nix::Result<(&'a [Found], HostAddr)> {
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: start.0,
        end: end.0,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: most,
        category_anyof_mask: categories,
        // What is alike in it is one range.
        return_mask: 0,
        ..Scan::default()
    };
    // SAFETY: the structure this ioctl reads and writes, with the address and the length of an array of `page_region`
    // that outlives the call; without PM_SCAN_WP_MATCHING it changes no page.
    let ranges = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    let ranges = usize::try_from(Errno::result(ranges)?).unwrap_or(0);
    Ok((&found[..ranges.min(found.len())], HostAddr(scan.walk_end)))
}
