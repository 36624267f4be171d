//! Memory of this process that is read and written through the kernel: what can't be is an error and not a signal.
#![expect(unsafe_code, reason = "raw memory calls, each checked by the kernel")]

use std::io;
use std::sync::Arc;

use page_units::{ByteLen, HostAddr, PageRun};
use uffd_engine::Region;
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};

use crate::ram::{Memory, OwnersBitmap, Piece};

/// A mapping as this crate has it, of one with a bitmap of another type, which it keeps.
pub(crate) fn view_of<B: Bitmap + Send + Sync + 'static>(
    region: Arc<MmapRegion<B>>,
) -> Result<MmapRegion<OwnersBitmap>, MmapRegionError> {
    let builder = MmapRegionBuilder::new_with_bitmap(region.size(), OwnersBitmap::of(Arc::clone(&region)));
    let builder = builder.with_mmap_prot(region.prot()).with_mmap_flags(region.flags());
    let builder = match region.is_hugetlbfs() {
        Some(huge) => builder.with_hugetlbfs(huge),
        None => builder,
    };
    let builder = match region.file_offset() {
        Some(file) => builder.with_file_offset(file.clone()),
        None => builder,
    };
    // SAFETY: a mapping of that size, which stays as long as the bitmap does: a part of the new one.
    unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) }.build()
}

/// A piece of guest memory, with the second mapping of its file if there is one, for an engine or a freeze, which keeps both
/// mapped.
pub(crate) fn region(
    memory: Memory,
    alias: Option<Arc<MmapRegion<OwnersBitmap>>>,
    piece: &Piece,
    run: PageRun,
) -> Region {
    // SAFETY: the piece was made of a region of `memory`, which stays mapped as long as its owner, kept below; `vm-memory`
    // hands out no references into it.
    let region = unsafe { Region::from_raw(piece.host, run, piece.backing) }.with_shared(piece.shared);
    let region = match &alias {
        // SAFETY: a writable mapping of the same length, also kept below, which nobody else uses.
        Some(alias) => unsafe { region.with_alias(HostAddr(alias.as_ptr().addr() as u64)) },
        None => region,
    };
    region.with_owner(Arc::new((memory, alias)))
}

/// Gives a range back: `MADV_DONTNEED` drops private pages, `MADV_REMOVE` punches the file behind shared ones.
pub(crate) fn give_back(start: HostAddr, length: ByteLen, shared: bool) -> io::Result<()> {
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let at: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(usize::try_from(start.0).unwrap_or(0));
    // SAFETY: a range of guest memory (the caller has looked), to which there are no Rust references: `vm-memory` hands
    // out none.
    match unsafe { libc::madvise(at, length.get(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the byte of this process at `address` can be read, asked of the kernel: no signal when it can't.
#[cfg(feature = "vcpus")]
pub(crate) fn readable(address: HostAddr) -> bool {
    read_memory(address, &mut [0]).is_ok()
}

/// Copies memory of this process through the kernel: what can't be read is an error and not a signal.
pub(crate) fn read_memory(from: HostAddr, to: &mut [u8]) -> io::Result<()> {
    let myself = nix::unistd::getpid().as_raw();
    let mut done = 0;
    while done < to.len() {
        let rest = &mut to[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let address = usize::try_from(from.0).map_err(io::Error::other)? + done;
        let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: rest.len() };
        // SAFETY: the kernel checks both ranges, and writes to `rest` alone.
        let read = unsafe { libc::process_vm_readv(myself, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(read) {
            Err(_) => return Err(io::Error::last_os_error()),
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(read) => done += read,
        }
    }
    Ok(())
}

/// Copies `len` bytes at `from`, wherever they are (a mapped file, too), to memory of this process through the kernel.
pub(crate) fn write_memory(from: *const u8, to: HostAddr, len: ByteLen) -> io::Result<()> {
    let myself = nix::unistd::getpid().as_raw();
    let len = len.get();
    let mut done = 0;
    while done < len {
        let local = libc::iovec { iov_base: from.wrapping_add(done).cast_mut().cast(), iov_len: len - done };
        let address = usize::try_from(to.0).map_err(io::Error::other)? + done;
        let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: len - done };
        // SAFETY: the kernel checks both ranges. It writes to guest memory, to which there are no references: all of
        // Rust looks at it through volatile accesses.
        let written = unsafe { libc::process_vm_writev(myself, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(written) {
            Err(_) => return Err(io::Error::last_os_error()),
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(written) => done += written,
        }
    }
    Ok(())
}
