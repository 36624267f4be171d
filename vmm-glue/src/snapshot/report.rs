//! What a restore did: nothing is chosen or given up silently.

use std::time::Duration;

use page_units::{BlockId, GuestAddr, Layout, PageCount, PageRun};
use uffd_engine::Backing;

use super::Step;
use crate::{GuestRam, Restored};

/// How memory came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// All of it before the guest ran.
    Eager {
        /// Pages with content.
        stored: PageCount,
        /// Zero pages.
        zero: PageCount,
    },
    /// When it was touched, and in the background; the engine's statistics tell more.
    OnDemand,
}

/// How a guest was restored, and how long each step took.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreReport {
    /// How memory came.
    pub mode: Mode,
    /// What the memory is made of.
    pub backing: Backing,
    /// From the call until the vCPUs were let go (or were ready to be).
    pub took: Duration,
    /// How time goes on.
    pub time: Restored,
    /// The steps, each with the time it took. The machine is made on a thread of its own meanwhile, so together they
    /// take longer than all.
    pub steps: Vec<(Step, Duration)>,
    pub(crate) source: Layout,
}

impl RestoreReport {
    /// How long a step took.
    #[must_use]
    pub fn step(&self, step: Step) -> Duration {
        self.steps.iter().filter(|(found, _)| *found == step).map(|(_, took)| *took).sum()
    }

    /// Where the first page of a run of the source's blocks is in the guest.
    pub(crate) fn place(&self, ram: &GuestRam, run: PageRun) -> Option<GuestAddr> {
        let name = self.source.get(run.block)?.name();
        let (block, _): (BlockId, _) = ram.layout().find(name)?;
        ram.page_to_guest(block, run.first)
    }
}
