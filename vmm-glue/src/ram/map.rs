//! Mapping fresh memory, and what mapped memory is made of.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use page_units::{ByteLen, PageSize, RamBlock};
use uffd_engine::Backing;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::OwnersBitmap;

pub(super) fn file_of(block: &RamBlock, backing: Backing) -> io::Result<Option<File>> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let flags = match backing {
        Backing::Anonymous => return Ok(None),
        Backing::Memfd => flags,
        Backing::Hugetlb => flags | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    };
    let file = File::from(memfd_create(block.name(), flags)?);
    file.set_len(block.length().0)?;
    // Another owner of the file can't cut memory off, which would be a SIGBUS for each of its users.
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
    Ok(Some(file))
}

pub(super) fn map(
    len: ByteLen,
    file: Option<&File>,
    offset: ByteLen,
    backing: Backing,
) -> Result<MmapRegion<OwnersBitmap>, Box<dyn std::error::Error>> {
    let builder = MmapRegionBuilder::new_with_bitmap(len.get(), OwnersBitmap::default())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(backing == Backing::Hugetlb);
    let builder = match file {
        None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
        Some(file) => {
            // Huge pages are reserved: there is an error here instead of a signal later.
            let lazily = if backing == Backing::Hugetlb { 0 } else { libc::MAP_NORESERVE };
            builder
                .with_mmap_flags(libc::MAP_SHARED | lazily)
                .with_file_offset(FileOffset::new(file.try_clone()?, offset.0))
        }
    };
    Ok(builder.build()?)
}

/// What a region of somebody else is made of; what cannot be is an error. (`vm-memory` knows that it consists of huge pages
/// only if it was told.)
pub(super) fn backing_of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Result<Backing, String> {
    let page = match region.file_offset() {
        Some(at) => {
            let system = fstatfs(at.file()).map_err(|error| format!("its file can't be asked what it is: {error}"))?;
            // In a file system of huge pages a block is one of them (Linux fs/hugetlbfs/inode.c).
            (system.filesystem_type() == HUGETLBFS_MAGIC).then(|| u64::try_from(system.block_size()).unwrap_or(0))
        }
        None => {
            // mmap(2): the logarithm of the page size, or 0 for the usual size.
            let shift = region.flags() >> libc::MAP_HUGE_SHIFT & 0x3f;
            let size = if shift == 0 { PageSize::HUGE.bytes().0 } else { 1 << shift };
            (region.flags() & libc::MAP_HUGETLB != 0 || region.is_hugetlbfs() == Some(true)).then_some(size)
        }
    };
    match (page, region.file_offset()) {
        (Some(size), _) if size != PageSize::HUGE.bytes().0 => {
            Err(format!("huge pages of {size} bytes can't be served"))
        }
        (Some(_), _) => Ok(Backing::Hugetlb),
        (None, Some(_)) => Ok(Backing::Memfd),
        (None, None) => Ok(Backing::Anonymous),
    }
}
