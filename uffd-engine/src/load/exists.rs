//! What it means that the kernel calls a page there (`EEXIST`), which is believed only after a look.
//!
//! - The page is there: another thread was faster, or it was touched before the engine was started.
//! - The file behind shared memory holds it, past the engine: another mapping has touched it, and what it holds is no
//!   content of the source.
//! - There is no huge page left: `hugetlb_mfill_atomic_pte` of Linux 6.18 (mm/hugetlb.c) answers `EEXIST` for that too.

use std::sync::Arc;

use nix::errno::Errno;
use page_source::Reply;

use super::install::Step;
use super::intake::{Intake, stopped};
use crate::EngineError;
use crate::memory::backing::Backing;
use crate::memory::gate::{Gate, holder};
use crate::memory::huge_file::HugeFile;
use crate::memory::states::State;
use crate::memory::{Area, Place};
use crate::sys::ops::{self, Done};

impl Intake {
    /// The kernel calls the first of some claimed granules there. Its waiters are woken if it is.
    pub(super) fn exists(&self, gate: &Gate<'_>, at: Place) -> Step {
        let area = self.memory.area(at.area);
        let in_file = area.region.shared && area.region.backing != Backing::Anonymous;
        let was = self.memory.states(at.area).claimed_from(at.granule);
        if in_file && was == State::Missing && !self.prefilled {
            return Step::Stop(self.filled_elsewhere(area, at));
        }
        if area.region.backing != Backing::Anonymous {
            let (addr, len) = (area.addr(at.granule), area.len_of(1));
            let protect = holder(gate).is_some_and(|holder| holder.protects(at, 1));
            match ops::map_cached(self.memory.view.descriptor.fd(), addr.0, len.0, protect) {
                Done::All => return Step::Advanced(1),
                Done::Part(_) | Done::Failed(Errno::EAGAIN) => return Step::ReadEvents,
                Done::Failed(Errno::EEXIST) => return self.is_there(at),
                // EINVAL: a private mapping. EFAULT: the file does not hold it.
                Done::Failed(_) => {}
            }
        }
        match self.memory.view.is_mapped(area, at.granule) {
            Some(true) => self.is_there(at),
            None if area.region.backing != Backing::Hugetlb => self.is_there(at),
            // It was there a moment ago.
            Some(false) if area.region.backing != Backing::Hugetlb => Step::ReadEvents,
            Some(false) | None => Step::Stop(self.no_huge_page(area, at)),
        }
    }

    fn is_there(&self, at: Place) -> Step {
        self.memory.wake(at, 1);
        Step::Advanced(1)
    }

    /// The kernel has no huge page left: fails the engine.
    pub(super) fn no_huge_page(&self, area: &Area, at: Place) -> Reply {
        let (block, run) = (Arc::clone(&area.name), area.pages(at.granule, 1));
        self.status.fail(EngineError::NoHugePage { block, run, at: area.addr(at.granule) });
        stopped()
    }

    /// The file behind shared memory holds a page that nobody here has put there: fails the engine.
    fn filled_elsewhere(&self, area: &Area, at: Place) -> Reply {
        if area.region.backing == Backing::Hugetlb && !held_by_file(area, at).unwrap_or(false) {
            return self.no_huge_page(area, at);
        }
        let (block, run) = (Arc::clone(&area.name), area.pages(at.granule, 1));
        self.status.fail(EngineError::FilledElsewhere { block, run, at: area.addr(at.granule) });
        stopped()
    }
}

/// Whether the file behind a huge page holds it, as far as that can be told.
fn held_by_file(area: &Area, at: Place) -> Option<bool> {
    let (file, offset) = area.region.file.as_ref()?;
    let granule = HugeFile::new(file, *offset, area.region.len()).ok()?;
    granule.holds(area.len_of(at.granule)).ok()
}
