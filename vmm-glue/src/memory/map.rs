//! Mapping fresh memory.

use std::fs::File;
use std::io;

use nix::sys::memfd::{MFdFlags, memfd_create};
use page_source::{ByteLen, RamBlock};
use uffd_engine::Backing;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

pub(super) fn file_of(block: &RamBlock, backing: Backing) -> io::Result<Option<File>> {
    let flags = match backing {
        Backing::Anonymous => return Ok(None),
        Backing::Memfd => MFdFlags::MFD_CLOEXEC,
        Backing::Hugetlb => MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    };
    let file = File::from(memfd_create(block.name(), flags)?);
    file.set_len(block.length().0)?;
    Ok(Some(file))
}

pub(super) fn map(
    len: ByteLen,
    file: Option<&File>,
    offset: ByteLen,
    backing: Backing,
) -> Result<MmapRegion<()>, Box<dyn std::error::Error>> {
    let builder = MmapRegionBuilder::new_with_bitmap(len.get(), ())
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
