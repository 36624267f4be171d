//! Which huge pages a file holds, including those that other processes have filled.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use page_units::{ByteLen, FileOffset, PageSize};
use userfaultfd::RegisterMode;

use crate::memory::backing::Backing;
use crate::memory::descriptor::Descriptor;
use crate::sys::abi::Features;
use crate::sys::mapping::Mapping;
use crate::sys::ops::{self, Done};

/// A part of a file of huge pages of 2 MiB (hugetlbfs, or a memfd of that kind), to ask which of them there are.
///
/// Neither the page table of a mapping tells, which lacks what nobody has touched there, nor the file: `lseek` calls all
/// of it data, and reading a hole gives zeros. `UFFDIO_CONTINUE` does: it maps what the file holds and allocates
/// nothing. It is asked of a mapping of its own, so that nobody who uses the memory notices.
#[derive(Debug)]
pub(crate) struct HugeFile {
    // First: what is unmapped has no use for it.
    mapping: Mapping,
    descriptor: Descriptor,
}

impl HugeFile {
    /// Maps `length` bytes of `file` from `offset` on, both multiples of 2 MiB. Costs neither pages nor a
    /// reservation of pages.
    ///
    /// # Errors
    /// If there is no userfaultfd that can do it (Linux 5.13), or this is no such file.
    pub(crate) fn new(file: &File, offset: FileOffset, length: ByteLen) -> io::Result<HugeFile> {
        let descriptor = Descriptor::create(Backing::Hugetlb.features(), Features::empty(), true);
        let descriptor = descriptor.map_err(io::Error::other)?;
        let mapping = Mapping::new(file, offset, length)?;
        descriptor.register(mapping.addr(), length, RegisterMode::MINOR).map_err(io::Error::other)?;
        Ok(HugeFile { mapping, descriptor })
    }

    /// Whether the file holds the huge page `at` bytes behind the offset. Takes about a microsecond.
    ///
    /// # Errors
    /// If that is outside, no multiple of 2 MiB, or the kernel does not say.
    pub(crate) fn holds(&self, at: ByteLen) -> io::Result<bool> {
        loop {
            let start = self.mapping.addr().checked_add(at).ok_or(io::ErrorKind::InvalidInput)?;
            match ops::map_cached(self.descriptor.fd(), start.0, PageSize::HUGE.bytes().0, false) {
                // Mapped now, or by the last question.
                Done::All | Done::Part(_) | Done::Failed(Errno::EEXIST) => return Ok(true),
                Done::Failed(Errno::EFAULT) => return Ok(false),
                Done::Failed(Errno::EAGAIN) => {}
                Done::Failed(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::fcntl::{FallocateFlags, fallocate};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use testkit::hugepages::Overcommit;

    use super::*;

    #[test]
    fn a_file_is_asked_and_not_a_mapping() {
        testkit::require!(Userfaultfd, Hugepages);
        const HUGE: u64 = 2 << 20;
        let _room = Overcommit::reserve(8).unwrap();
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let file = File::from(memfd_create("asked", flags).unwrap());
        file.set_len(8 * HUGE).unwrap();
        let asked = HugeFile::new(&file, FileOffset(HUGE), ByteLen(6 * HUGE)).unwrap();
        let holds = || (0..6).map(|page| asked.holds(ByteLen(page * HUGE)).unwrap()).collect::<Vec<_>>();
        assert_eq!(holds(), [false; 6]);
        // Filled by the file itself: nobody has it mapped.
        let fill = |page: i64, mode| fallocate(&file, mode, page << 21, 1 << 21).unwrap();
        for page in [0, 2, 6] {
            fill(page, FallocateFlags::empty());
        }
        for _ in 0..2 {
            assert_eq!(holds(), [false, true, false, false, false, true]);
        }
        assert_eq!(file.metadata().unwrap().blocks(), 3 * HUGE / 512, "asking allocates nothing");
        fill(2, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE);
        assert_eq!(holds(), [false, false, false, false, false, true]);
        assert!(asked.holds(ByteLen(6 * HUGE)).is_err() && asked.holds(ByteLen(1)).is_err());
        // A file on a disk; temporary files may be in memory.
        let other = tempfile::tempfile().unwrap();
        if nix::sys::statfs::fstatfs(&other).unwrap().filesystem_type() != nix::sys::statfs::TMPFS_MAGIC {
            assert!(HugeFile::new(&other, FileOffset(0), ByteLen(HUGE)).is_err());
        }
    }
}
