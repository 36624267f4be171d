//! All of the unsafe code of this crate: the kernel's structures, its calls, and raw memory.
//!
//! What the rest of the crate gets from here:
//! - [`abi`]: ioctl numbers, structures and bits, asserted at compile time;
//! - [`ops`]: one function per ioctl, with what it did as a value;
//! - [`open`]: a new descriptor, or the exact reason why there is none;
//! - [`ksm`]: no merging of equal pages;
//! - [`memory`]: zeroed tables, scratch mappings, discards;
//! - [`mapping`]: a second mapping of a file;
//! - [`read`]: reading guest memory without a SIGBUS;
//! - [`owned`]: memory of its own for somebody else to use;
//! - [`scan`]: where in a page table there is something.
#![expect(unsafe_code, reason = "system calls on raw addresses")]

pub(crate) mod abi;
pub(crate) mod ksm;
pub(crate) mod mapping;
pub(crate) mod memory;
pub(crate) mod open;
pub(crate) mod ops;
pub(crate) mod owned;
pub(crate) mod read;
pub(crate) mod scan;

/// The descriptor as the `userfaultfd` crate's type, which closes it.
pub(crate) fn own_uffd(fd: std::os::fd::RawFd) -> userfaultfd::Uffd {
    // SAFETY: the caller gives up an open descriptor that it owned.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}
