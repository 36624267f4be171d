//! Whether what a file system says of holes is believed.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use nix::sys::statfs::fstatfs;

/// File systems whose `SEEK_HOLE` and `SEEK_DATA` (lseek(2)) tell where there is data, by their numbers in
/// `include/uapi/linux/magic.h`. Not among them: FUSE and network file systems, behind which anybody answers, and ZFS,
/// which has called fresh data a hole (OpenZFS 2.1.4 to 2.2.1).
const BELIEVED: [i64; 7] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0x0102_1994, // tmpfs
    0xf2f5_2010, // F2FS
    0xca45_1a4e, // bcachefs
    0x794c_7630, // overlayfs, which asks the file system below
];

/// What is believed of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holes {
    /// Holes are where the file system says.
    Told,
    /// There is none: the file takes as much space as it is long.
    None,
    /// The file system does not tell: all of it is read.
    Unknown,
}

impl Holes {
    /// Of an open file.
    pub(crate) fn of(file: &File) -> Holes {
        let magic = fstatfs(file).map(|of| of.filesystem_type().0);
        if !magic.is_ok_and(|magic| BELIEVED.contains(&magic)) {
            return Holes::Unknown;
        }
        // Blocks are of 512 bytes (stat(2)).
        let full = file.metadata().is_ok_and(|of| of.blocks().saturating_mul(512) >= of.size());
        if full { Holes::None } else { Holes::Told }
    }
}
