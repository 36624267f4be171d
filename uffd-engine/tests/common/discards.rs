//! The ways in which memory is given back.

use nix::sys::mman::{MmapAdvise, madvise};
use page_units::PageRun;
use uffd_engine::{Discards, Engine};

use super::{Kind, Memory};

/// What a balloon does: from any thread, without a word to the engine.
#[expect(unsafe_code, reason = "a discard as a VMM does it")]
pub(crate) fn give_back(memory: &Memory, run: PageRun) {
    let at = memory.addr(run.block) + run.first.byte_offset();
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(at.0).unwrap());
    let advice = match memory.kind {
        Kind::MemfdShared | Kind::HugetlbShared | Kind::HugetlbAlias => MmapAdvise::MADV_REMOVE,
        Kind::Anonymous | Kind::MemfdPrivate | Kind::HugetlbPrivate => MmapAdvise::MADV_DONTNEED,
    };
    // SAFETY: pages of the test's own mapping, of which nothing is borrowed.
    unsafe { madvise(std::ptr::NonNull::new(at).unwrap(), run.len().get(), advice) }.unwrap();
}

/// Leaves a part of the memory out of core dumps: the kernel has mappings of their own for it then.
#[expect(unsafe_code, reason = "advice as a VMM gives it")]
pub(crate) fn split_off(memory: &Memory, run: PageRun) {
    let at = memory.addr(run.block) + run.first.byte_offset();
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(at.0).unwrap());
    // SAFETY: pages of the test's own mapping, whose content it does not change.
    unsafe { madvise(std::ptr::NonNull::new(at).unwrap(), run.len().get(), MmapAdvise::MADV_DONTDUMP) }.unwrap();
}

/// How a discard is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Way {
    Kernel,
    Engine,
    EngineAnnounced,
}

impl Way {
    pub(crate) fn discards(self) -> Discards {
        match self {
            Way::Kernel | Way::Engine => Discards::Events,
            Way::EngineAnnounced => Discards::Announced,
        }
    }
}

pub(crate) fn discard(way: Way, engine: &Engine, memory: &Memory, run: PageRun) {
    match way {
        Way::Kernel => give_back(memory, run),
        Way::Engine | Way::EngineAnnounced => engine.discard(run).unwrap(),
    }
}
