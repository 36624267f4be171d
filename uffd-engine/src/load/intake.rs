//! What takes the pages in that a source delivers. It knows no source, so that a feed that holds it makes no cycle.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use page_source::{Reply, SinkError, SourceError};
use page_units::{PageCount, PageRun};

use super::huge::Staging;
use super::latencies::Latencies;
use super::recent_faults::RecentFaults;
use super::residency::Residency;
use super::status::{Status, Task};
use super::window::Window;
use crate::EngineError;
use crate::memory::{Memory, Place};
use crate::options::FailurePolicy;
use crate::serve::events;
use crate::serve::served::Discarded;
use crate::stats::bump;

/// Whether there is a next step, or what the source is told.
pub(crate) type Flow = ControlFlow<Reply>;

/// The sink of an engine: see its [`PageSink`](page_source::PageSink).
#[derive(Debug)]
pub(crate) struct Intake {
    pub(crate) memory: Arc<Memory>,
    pub(crate) status: Status,
    pub(crate) window: Window,
    pub(crate) recent_faults: RecentFaults,
    /// When the faults were read that wait for a late source.
    pub(crate) latencies: Latencies,
    pub(crate) staging: Staging,
    pub(crate) policy: FailurePolicy,
    pub(crate) residency: Residency,
    /// Whether what files hold of missing pages is content: see [`Builder::prefilled`](crate::Builder::prefilled).
    pub(crate) prefilled: bool,
}

impl Intake {
    pub(crate) fn new(
        memory: Arc<Memory>,
        staging: Staging,
        (policy, prefilled): (FailurePolicy, bool),
        window: PageCount,
        wait_limit: Option<Duration>,
    ) -> Intake {
        Intake {
            residency: Residency::new(&memory.view.areas),
            memory,
            status: Status::default(),
            window: Window::new(window),
            recent_faults: RecentFaults::default(),
            latencies: Latencies::new(wait_limit),
            staging,
            policy,
            prefilled,
        }
    }

    /// A number of requested pages has ended. After the last one there may be nothing left to do.
    pub(crate) fn answered(&self, pages: u64) {
        if self.window.answered(pages) {
            self.status.tell(Task::Check);
        }
    }

    /// Content arrived that is not needed: the guest has the page, gave it back, or another thread installs it.
    pub(crate) fn not_taken(&self, area: usize, granule: usize) {
        let pages = self.memory.area(area).granule.0;
        bump(&self.memory.counters.duplicates, pages);
        if self.memory.states(area).unrequest(granule) {
            self.answered(pages);
        }
    }

    /// A granule is settled that was observed in flight: the completion check runs again if it relies on that.
    pub(crate) fn was_met(&self) {
        if self.status.take_interest() {
            self.status.tell(Task::Check);
        }
    }

    /// An install has to wait until an event was read: lets its reader run. Nothing is claimed by the caller.
    pub(crate) fn blocked(&self) {
        events::read_without_handlers(&self.memory, self);
        std::thread::yield_now();
    }

    /// An error that the source gave for some pages.
    pub(crate) fn source_error(&self, run: PageRun, error: SourceError) -> EngineError {
        let area = self.memory.view.areas.iter().find(|area| area.block() == run.block);
        EngineError::Source { block: area.map(|area| Arc::clone(&area.name)).unwrap_or_default(), run, error }
    }
}

impl Discarded for Intake {
    fn discarded(&self, at: Place, requested: bool) {
        let area = self.memory.area(at.area);
        if requested {
            self.answered(area.granule.0);
        }
        self.latencies.forget(at);
        if !area.small() {
            self.staging.settled(at, None);
        }
    }
}

pub(crate) fn stopped() -> Reply {
    SinkError::stopped("the engine has ended").into()
}
