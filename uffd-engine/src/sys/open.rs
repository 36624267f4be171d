//! A new userfaultfd, or the exact reason why there is none.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::abi::{Api, Features, UFFD_API, UFFD_API_IOCTL, USERFAULTFD_IOC_NEW};
use crate::OpenError;

const DEVICE: &str = "/dev/userfaultfd";

/// A descriptor without its handshake, from the device node, else from the system call. It handles faults that the
/// kernel itself takes (KVM does), so `UFFD_USER_MODE_ONLY` is not an option.
pub(crate) fn new_descriptor(nonblocking: bool) -> Result<OwnedFd, OpenError> {
    let flags = libc::O_CLOEXEC | if nonblocking { libc::O_NONBLOCK } else { 0 };
    let device = match OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(device) => {
            // SAFETY: the ioctl takes its flags by value and touches no memory.
            let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
            match owned(i64::from(fd)) {
                Ok(fd) => return Ok(fd),
                Err(error) => error,
            }
        }
        Err(error) => error,
    };
    // SAFETY: the call takes its flags by value and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(fd).map_err(|syscall| OpenError::NotPermitted { device, syscall })
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// `UFFDIO_API`: what the kernel offers, after it has agreed to `wanted`. May be done once for a descriptor.
pub(crate) fn handshake(fd: &OwnedFd, wanted: Features) -> io::Result<Features> {
    let mut api = Api { api: UFFD_API, features: wanted.bits(), ioctls: 0 };
    // SAFETY: `api` is the structure this ioctl reads and writes.
    let status = unsafe { libc::ioctl(fd.as_raw_fd(), UFFD_API_IOCTL, &raw mut api) };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Features::from_bits_retain(api.features))
}
