//! What happens to memory behind the back of the engine or the freeze.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};
use page_units::{BlockId, PageRun};

use super::{Kind, Memory, PAGE};

/// Something that changes memory, or what it is mapped as, without a word to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// `MADV_FREE`, and then a write to each page.
    FreeLazily,
    /// `MADV_DONTNEED` or, of shared memory, `MADV_REMOVE`.
    GiveBack,
    /// `fallocate(FALLOC_FL_PUNCH_HOLE)` of the file.
    Punch,
    /// `fallocate` of the file: pages that read as zero.
    Allocate,
    /// `pwrite` to the file.
    WriteToFile,
    /// The file becomes shorter.
    Cut,
    Lock,
    Unlock,
    /// Another VMA, by advice.
    Advise,
    /// Another VMA, by rights.
    ReadOnly,
    /// Another VMA, by its NUMA policy.
    Bind,
    /// Swapped out, if there is swap.
    PageOut,
}

/// The file behind a block.
pub(crate) fn file(memory: &Memory, block: BlockId) -> Option<&File> {
    memory.maps[block.0 as usize].file_offset().map(|at| at.file())
}

fn advise(memory: &Memory, run: PageRun, advice: i32) -> bool {
    let at = memory.addr(run.block) + run.first.byte_offset();
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(at.0).unwrap());
    #[expect(unsafe_code, reason = "advice as a VMM gives it")]
    // SAFETY: pages of the test's own mapping, of which nothing is borrowed.
    unsafe {
        libc::madvise(at, run.len().get(), advice) == 0
    }
}

fn change(memory: &Memory, run: PageRun, act: Act) -> bool {
    // MPOL_PREFERRED, no node: the local one, but a policy of its own.
    const MPOL_PREFERRED: i64 = 1;
    let at = (memory.addr(run.block) + run.first.byte_offset()).0;
    let (call, argument) = match act {
        Act::Lock => (libc::SYS_mlock, 0),
        Act::Unlock => (libc::SYS_munlock, 0),
        Act::ReadOnly => (libc::SYS_mprotect, i64::from(libc::PROT_READ)),
        Act::Bind => (libc::SYS_mbind, MPOL_PREFERRED),
        _ => unreachable!("{act:?}"),
    };
    #[expect(unsafe_code, reason = "system calls on the test's own mapping")]
    // SAFETY: pages of the test's own mapping, of which nothing is borrowed; the content stays as it is.
    unsafe {
        libc::syscall(call, at, run.len().0, argument, 0u64, 0u64, 0u64) == 0
    }
}

/// Does it. `false` if this memory can't be treated so.
pub(crate) fn happen(memory: &Memory, run: PageRun, act: Act) -> bool {
    let private = matches!(memory.kind, Kind::Anonymous | Kind::HugetlbPrivate);
    let huge = !matches!(memory.kind, Kind::Anonymous | Kind::MemfdShared);
    let (at, len) = (run.first.byte_offset().0.cast_signed(), run.len().0.cast_signed());
    match act {
        Act::FreeLazily if memory.kind == Kind::Anonymous => {
            advise(memory, run, libc::MADV_FREE) && {
                run.iter().for_each(|page| memory.store(run.block, page, &[0x77; PAGE]));
                true
            }
        }
        Act::GiveBack if private => advise(memory, run, libc::MADV_DONTNEED),
        Act::GiveBack => advise(memory, run, libc::MADV_REMOVE),
        Act::Punch | Act::Allocate | Act::WriteToFile | Act::Cut => {
            let Some(file) = file(memory, run.block) else { return false };
            match act {
                Act::Punch => {
                    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    fallocate(file, flags, at, len).is_ok()
                }
                Act::Allocate => fallocate(file, FallocateFlags::empty(), at, len).is_ok(),
                // Files of huge pages can't be written to.
                Act::WriteToFile => file.write_all_at(&vec![0xcc; run.len().get()], run.first.byte_offset().0).is_ok(),
                _ => file.set_len(run.first.byte_offset().0).is_ok(),
            }
        }
        Act::Lock | Act::Unlock | Act::ReadOnly | Act::Bind => change(memory, run, act),
        Act::Advise => advise(memory, run, libc::MADV_DONTDUMP),
        Act::PageOut if !huge => advise(memory, run, libc::MADV_PAGEOUT),
        Act::FreeLazily | Act::PageOut => false,
    }
}
