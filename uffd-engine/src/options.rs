//! What a user of an engine can choose.

use std::time::Duration;

use page_units::{ByteLen, PageCount};

/// The threads that serve page faults, and where they run: it decides the latency of a fault more than anything else.
///
/// A handler on the core of the vCPU that faults needs no wake-up of another core; where other cores are idle and deep
/// asleep that wake-up costs more than the whole fault. [`Handlers::on_cores`] with the vCPUs' cores is the fastest
/// arrangement wherever it was measured with emulated or host-side faults; [`Wait::Spin`] on a core of its own can
/// win for natively running guests, at the price of that core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handlers {
    pub(crate) cores: Vec<Option<usize>>,
    pub(crate) wait: Wait,
}

/// How a handler waits for the next fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Wait {
    /// In the kernel.
    Block,
    /// In a loop that asks again and again, and takes a core for itself.
    Spin,
}

impl Default for Handlers {
    /// One thread that blocks, on whatever core the scheduler picks.
    fn default() -> Handlers {
        Handlers::threads(1)
    }
}

impl Handlers {
    /// A number of threads (at least one), on whatever core the scheduler picks.
    #[must_use]
    pub fn threads(count: usize) -> Handlers {
        Handlers { cores: vec![None; count.max(1)], wait: Wait::Block }
    }

    /// One thread for each of these cores, bound to it: give the cores that the vCPUs are bound to for one handler per
    /// vCPU on the faulting core, or others for handlers elsewhere.
    #[must_use]
    pub fn on_cores(cores: impl IntoIterator<Item = usize>) -> Handlers {
        let cores: Vec<_> = cores.into_iter().map(Some).collect();
        if cores.is_empty() { Handlers::default() } else { Handlers { cores, wait: Wait::Block } }
    }

    /// How they wait.
    #[must_use]
    pub fn waiting(mut self, wait: Wait) -> Handlers {
        self.wait = wait;
        self
    }
}

/// The threads that bring in what nobody has asked for yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Background {
    pub(crate) threads: usize,
    pub(crate) cores: Vec<usize>,
    pub(crate) paused: bool,
    pub(crate) rate: Option<ByteLen>,
    pub(crate) piece: PageCount,
    pub(crate) window: PageCount,
}

impl Default for Background {
    /// One thread, running, no limit of its rate, requests of 1 MiB, at most 32 MiB unanswered.
    fn default() -> Background {
        Background {
            threads: 1,
            cores: Vec::new(),
            paused: false,
            rate: None,
            piece: PageCount(256),
            window: PageCount(8192),
        }
    }
}

impl Background {
    /// None at all: pages come only when they are touched, and the engine is never complete by itself. It can't be
    /// switched on later; [`paused`](Background::paused) can.
    #[must_use]
    pub fn off() -> Background {
        Background { threads: 0, ..Background::default() }
    }

    /// A number of threads.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Background {
        self.threads = threads;
        self
    }

    /// Bound to these cores, the first thread to the first core, and so on in turn.
    #[must_use]
    pub fn on_cores(mut self, cores: impl IntoIterator<Item = usize>) -> Background {
        self.cores = cores.into_iter().collect();
        self
    }

    /// Waits for [`Engine::resume_background`](crate::Engine::resume_background).
    #[must_use]
    pub fn paused(mut self) -> Background {
        self.paused = true;
        self
    }

    /// Limits the bytes of content per second, of all threads together.
    #[must_use]
    pub fn with_rate(mut self, per_second: ByteLen) -> Background {
        self.rate = Some(per_second);
        self
    }

    /// How many pages a request has (at least 1, at most 512).
    #[must_use]
    pub fn with_piece(mut self, pages: PageCount) -> Background {
        self.piece = pages.clamp(PageCount(1), PageCount(512));
        self
    }

    /// How many pages may be requested and not yet answered: it matters for sources that answer late.
    #[must_use]
    pub fn with_window(mut self, pages: PageCount) -> Background {
        self.window = pages.max(PageCount(1));
        self
    }
}

/// How the engine learns that the guest gives memory back (balloon, free page reporting, `madvise`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Discards {
    /// The kernel reports each discard in any thread (`UFFD_FEATURE_EVENT_REMOVE`), and the discarding thread waits
    /// until the engine has read it. No install may be under way at that moment, so reading faults waits for the install of
    /// the background that is in progress (of at most 128 KiB then, and of 16 KiB while there are faults): correct for
    /// every discard, and a demand fault waits a little longer while the background runs.
    Events,
    /// Every discard of memory that is being served goes through [`Engine::discard`](crate::Engine::discard): the
    /// caller promises it. Faults are then read without any lock, which is the fastest way.
    Announced,
}

/// What an engine does when every page is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhenComplete {
    /// Lets the memory go: it is ordinary memory again, and the source is finished.
    #[default]
    LetGo,
    /// Keeps the memory registered and the source open: [`Engine::wait`](crate::Engine::wait) returns, and the engine
    /// goes on serving what the guest gives back and touches again, until it is dropped. The seam for a reset. Costs no
    /// wake-ups.
    StayArmed,
}

/// What happens when content is unavailable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FailurePolicy {
    /// Everything that is missing is poisoned (any access is an error from then on), the VMM is told, and the engine
    /// ends.
    #[default]
    PoisonMissing,
    /// Only the pages whose content is unavailable are poisoned, the VMM is told, and the engine goes on. A source that
    /// breaks as a whole ends the engine all the same.
    ///
    /// Where a page table of a guest is among them, KVM makes page faults of the guest's own of that: a VMM that
    /// wants the guest to stop then has to see to it when it is told.
    PoisonFailed,
}

/// What an engine tells its observer, from a thread of its own that serves no faults.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The guest has touched a missing page for the first time.
    FirstFault {
        /// After the engine's start.
        after: Duration,
    },
    /// Every page of a region that has content is in.
    RegionComplete {
        /// The pages of the region.
        run: page_units::PageRun,
    },
    /// Every page is in. The memory is ordinary memory again, unless the engine [stays armed](WhenComplete::StayArmed).
    Complete {
        /// After the engine's start.
        after: Duration,
    },
    /// A page has been waited for longer than the [limit](crate::Builder::report_waits_after). Told once for each wait.
    Waiting {
        /// The pages that are waited for.
        run: page_units::PageRun,
        /// For how long, so far.
        time: Duration,
    },
    /// Some pages are poisoned, and the engine goes on ([`FailurePolicy::PoisonFailed`]).
    PagesFailed(crate::EngineError),
    /// The engine has failed. What was missing is poisoned.
    Failed(crate::EngineError),
}
