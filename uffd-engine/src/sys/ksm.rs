//! Kernel samepage merging: `MADV_UNMERGEABLE` of madvise(2), `PR_GET_MEMORY_MERGE` of prctl(2).

use std::io;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use page_units::{ByteLen, HostAddr};

/// `PR_GET_MEMORY_MERGE` of `include/uapi/linux/prctl.h`, Linux 6.4.
const PR_GET_MEMORY_MERGE: libc::c_int = 68;

/// Takes private memory of this process out of it: what is merged is copied apart. Memory that was not mergeable, and a
/// kernel that merges nothing, are fine.
pub(crate) fn unmerge(start: HostAddr, length: ByteLen) -> io::Result<()> {
    match advise(start, length, MmapAdvise::MADV_UNMERGEABLE) {
        // It has no KSM.
        Err(Errno::EINVAL) => Ok(()),
        done => Ok(done?),
    }
}

/// Makes private memory of this process mergeable, if all memory of the process is to be (`PR_SET_MEMORY_MERGE`).
pub(crate) fn merge_again(start: HostAddr, length: ByteLen) {
    // SAFETY: the call takes no address and changes nothing.
    if unsafe { libc::prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) } != 1 {
        return;
    }
    if let Err(errno) = advise(start, length, MmapAdvise::MADV_MERGEABLE) {
        log::debug!("making {length} bytes at {start} mergeable again failed: {errno}");
    }
}

fn advise(start: HostAddr, length: ByteLen, advice: MmapAdvise) -> nix::Result<()> {
    let start = NonNull::new(std::ptr::with_exposed_provenance_mut(ByteLen(start.0).get())).ok_or(Errno::EINVAL)?;
    // SAFETY: both kinds of advice leave the content of memory as it is.
    unsafe { madvise(start, length.get(), advice) }
}
