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
