//! How to restore.

use std::fmt;
use std::sync::Arc;

use mapped_ram::Watch;
use uffd_engine::{Backing, Event};

use crate::VcpuOptions;
use crate::state::ClockPolicy;

/// What to make of a snapshot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// What guest memory is made of.
    pub backing: Backing,
    /// The vCPUs' threads.
    pub vcpus: VcpuOptions,
    /// How many threads load, when all is loaded before.
    pub eager_threads: usize,
    /// What time it is for the guest.
    pub clock: ClockPolicy,
    /// Told what the engine tells.
    pub observer: Option<Observer>,
    /// By what a change of the file is noticed, where this opens it ([`resume_on_demand`](crate::resume_on_demand)).
    pub watch: Watch,
}

/// Is told of an engine's events, on its supervising thread.
#[derive(Clone)]
pub struct Observer(pub(super) Arc<dyn Fn(&Event) + Send + Sync>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

impl Default for RestoreOptions {
    /// Anonymous memory, running at once, one thread.
    fn default() -> RestoreOptions {
        RestoreOptions {
            backing: Backing::Anonymous,
            vcpus: VcpuOptions::default(),
            eager_threads: 1,
            clock: ClockPolicy::GoOn,
            observer: None,
            watch: Watch::default(),
        }
    }
}

impl RestoreOptions {
    /// Memory of that kind.
    #[must_use]
    pub fn with_backing(mut self, backing: Backing) -> RestoreOptions {
        self.backing = backing;
        self
    }

    /// A change of the file is noticed by that.
    #[must_use]
    pub fn with_watch(mut self, watch: Watch) -> RestoreOptions {
        self.watch = watch;
        self
    }

    /// vCPU threads set up so.
    #[must_use]
    pub fn with_vcpus(mut self, vcpus: VcpuOptions) -> RestoreOptions {
        self.vcpus = vcpus;
        self
    }

    /// As many threads load, when all is loaded before the guest runs.
    #[must_use]
    pub fn with_eager_threads(mut self, threads: usize) -> RestoreOptions {
        self.eager_threads = threads;
        self
    }

    /// `observer` is told what the engine tells: first fault, completion, failure.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> RestoreOptions {
        self.observer = Some(Observer(Arc::new(observer)));
        self
    }

    /// The guest's clocks go on where they stood, or catch up.
    #[must_use]
    pub fn with_clock(mut self, clock: ClockPolicy) -> RestoreOptions {
        self.clock = clock;
        self
    }

    /// The guest waits for [`Vm::resume`](crate::Vm::resume).
    #[must_use]
    pub fn paused(mut self) -> RestoreOptions {
        self.vcpus.paused = true;
        self
    }
}
