//! The one call that no safe library has.
#![expect(unsafe_code, reason = "sync_file_range")]

use std::fs::File;
use std::os::fd::AsRawFd;

use page_units::FileOffset;

/// Starts writing what is dirty in a range of a file to the disk (sync_file_range(2)). It may wait for space in the
/// disk's queue, but not for the disk. An error is reported when the file is made durable, and not here.
pub(crate) fn start_writing(file: &File, first: FileOffset, end: FileOffset) {
    let (Ok(from), Ok(to)) = (i64::try_from(first.0), i64::try_from(end.0)) else { return };
    // SAFETY: takes a descriptor, which `file` keeps open, and numbers; touches no memory of this process.
    let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), from, to - from, libc::SYNC_FILE_RANGE_WRITE) };
}
