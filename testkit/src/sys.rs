//! The system calls for which there is no safe wrapper.
#![expect(unsafe_code, reason = "raw system calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `_IO(0xAA, 0)`, linux/userfaultfd.h.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;

pub(crate) fn userfaultfd_from_device(device: &File) -> io::Result<OwnedFd> {
    // SAFETY: the ioctl takes flags and no pointer.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
    owned(fd)
}

pub(crate) fn userfaultfd_from_syscall() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags and no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    owned(RawFd::try_from(fd).map_err(io::Error::other)?)
}

/// `struct uffdio_api`
#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `UFFDIO_API`
const UFFD_API_IOCTL: libc::Ioctl = 0xc018_aa3f;

/// What the kernel's userfaultfd can do (`UFFD_FEATURE_*`). The descriptor is of no use afterwards.
pub(crate) fn userfaultfd_features(uffd: &OwnedFd) -> io::Result<u64> {
    let mut api = Api { api: 0xaa, ..Api::default() };
    // SAFETY: `api` is the structure that this ioctl reads and writes.
    let status = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFD_API_IOCTL, &raw mut api) };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(api.features) }
}

/// Maps one private 2 MiB page and gives it back.
pub(crate) fn try_huge_page() -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB | libc::MAP_POPULATE;
    let len = 2 << 20;
    // SAFETY: a new mapping at an address of the kernel's choosing touches nothing that exists.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is the mapping made above, to which nothing points.
    unsafe { libc::munmap(page, len) };
    Ok(())
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
