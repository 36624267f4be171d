//! A running engine.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use page_units::{PageCount, PageRun};

use crate::load::background::Plan;
use crate::load::fault::Origin;
use crate::load::status::Outcome;
use crate::memory::poison::stay_open;
use crate::memory::states::State;
use crate::memory::{Area, Memory};
use crate::pause::PausePoint;
use crate::serve::wait::Waiter;
use crate::stats::Stats;
use crate::sys::memory;
use crate::{Builder, EngineError};

/// Serves guest memory on demand, and brings in the rest in the background.
///
/// # Dropping
/// Dropping an engine that is not complete poisons everything that is missing, since without it the kernel would give
/// zeros without a word; then it ends its threads. An engine that is complete has nothing left to do: its memory is
/// ordinary memory, and dropping it changes nothing.
pub struct Engine {
    pub(crate) core: Arc<Memory>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) waiter: Arc<Waiter>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) supervisor: Option<JoinHandle<()>>,
    pub(crate) origin: Option<Arc<Origin>>,
}

/// How an engine became complete.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Completion {
    /// From the start of the engine until the last page was in.
    pub after: Duration,
    /// What it did.
    pub stats: Stats,
}

/// Why a range could not be given back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscardError {
    /// Not (entirely) inside the engine's regions, or not whole granules.
    #[error("{0} is not inside the regions of this engine, in whole granules")]
    Outside(PageRun),
    /// A live snapshot still needs what is there. Nothing has happened to it: try again when the snapshot is over.
    #[error("a live snapshot that is being taken still needs the content of {0}")]
    Frozen(PageRun),
    /// The memory belongs to another process, which discards for itself.
    #[error("the memory belongs to another process")]
    Foreign,
    /// The system call failed.
    #[error("giving {run} back failed: {error}")]
    System {
        /// The pages.
        run: PageRun,
        /// What the system said.
        #[source]
        error: std::io::Error,
    },
}

impl Engine {
    /// An engine to be configured.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Waits until every page is in.
    ///
    /// With [`Background::off`](crate::Background::off), or while the background is paused, that may be never.
    ///
    /// # Errors
    /// If the engine has failed. What was missing then is poisoned. [`EngineError::OnObserver`] if it has not ended, and
    /// this is called by its observer.
    pub fn wait(&self) -> Result<Completion, EngineError> {
        self.finished(self.core.status.wait(None)).unwrap_or(Err(EngineError::OnObserver))
    }

    /// As [`wait`](Engine::wait), for a limited time: `None` if it has not ended by then. Returns at once if it is called
    /// by the engine's observer.
    pub fn wait_for(&self, time: Duration) -> Option<Result<Completion, EngineError>> {
        self.finished(self.core.status.wait(Instant::now().checked_add(time)))
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Result<Completion, EngineError>> {
        self.finished(self.core.status.outcome())
    }

    /// Why the first of the pages could not be had that are poisoned while the engine goes on
    /// ([`FailurePolicy::PoisonFailed`](crate::FailurePolicy::PoisonFailed)), if there are any.
    #[must_use]
    pub fn failed_pages(&self) -> Option<EngineError> {
        self.core.status.failed_pages().cloned()
    }

    fn finished(&self, outcome: Option<Outcome>) -> Option<Result<Completion, EngineError>> {
        Some(match outcome? {
            Outcome::Complete(after) => Ok(Completion { after, stats: self.stats() }),
            Outcome::Failed(error) => Err(error),
        })
    }

    /// How many pages are not in memory yet and may have content.
    #[must_use]
    pub fn missing(&self) -> PageCount {
        let Some(origin) = self.origin.as_ref().filter(|_| self.core.status.running()) else { return PageCount(0) };
        let areas = self.core.areas.iter();
        let granules = |area: &Area| {
            let missing = |granule: &usize| matches!(area.states.get(*granule).state, State::Missing | State::InFlight);
            let spans = area.stored(&*origin.pages);
            spans.map(|(first, granules)| (first..first + granules).filter(missing).count()).sum::<usize>()
        };
        PageCount(areas.map(|area| granules(area) as u64 * area.granule.0).sum())
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.core.counters.snapshot()
    }

    /// Stops loading in the background after the requests that are under way. Faults are served as before.
    pub fn pause_background(&self) {
        self.plan.pause(true);
    }

    /// Goes on loading in the background.
    pub fn resume_background(&self) {
        self.plan.pause(false);
        self.core.window.wake();
    }

    /// Fails the engine: poisons what is missing, tells the observer, and returns when that is done; when it is called by
    /// the observer it returns at once, and that is done after the observer has returned. Nothing happens if it has ended
    /// already.
    pub fn cancel(&self) {
        self.core.status.fail(EngineError::Cancelled);
        self.core.status.wait(None);
    }

    /// Gives pages back to the host: they read as zero from now on, whatever the snapshot holds (private memory over a file
    /// that has the page, as that page: so the kernel has it). The one way to do so with
    /// [`Discards::Announced`](crate::Discards::Announced), and allowed with events too.
    ///
    /// Waits for installs of these pages that are under way. While the memory is frozen [with this
    /// engine](Engine::freezer) only pages are given back whose content is saved already.
    ///
    /// # Errors
    /// If the pages are not whole granules of this engine's regions, the memory is another process's, or some of them are
    /// [frozen](DiscardError::Frozen): nothing has happened then. Or the system refuses.
    pub fn discard(&self, run: PageRun) -> Result<(), DiscardError> {
        if self.core.descriptor.foreign() {
            return Err(DiscardError::Foreign);
        }
        let parts: Vec<_> = self.core.parts(run).collect();
        let covered: u64 = parts.iter().map(|(_, part)| part.pages.0).sum();
        let whole = |&(area, part): &(usize, PageRun)| {
            let area = &self.core.areas[area];
            let from = part.first - area.region.run.first;
            from.0.is_multiple_of(area.granule.0) && part.pages.0.is_multiple_of(area.granule.0)
        };
        if covered != run.pages.0 || !parts.iter().all(whole) {
            return Err(DiscardError::Outside(run));
        }
        // Until it is done no freeze begins.
        let _discarding = self.core.discarding.read();
        if let Some(frozen) = self.core.frozen() {
            let needed = |&(area, part): &(usize, PageRun)| {
                let area = &self.core.areas[area];
                let start = area.addr(area.granule_of(part.first));
                frozen.needs(start, start + part.len())
            };
            if parts.iter().any(needed) {
                return Err(DiscardError::Frozen(run));
            }
        }
        for (number, part) in parts {
            let area = &self.core.areas[number];
            let first = area.granule_of(part.first);
            let granules = page_units::ByteLen(part.pages.0 / area.granule.0).get();
            for granule in first..first + granules {
                self.core.pauses.at(PausePoint::Discarding);
                while self.core.remove_granule(number, granule) == State::InFlight {
                    std::thread::yield_now();
                }
            }
            let given_back = memory::give_back(area.addr(first), part.len(), area.region.shared);
            // Whoever waits there waits for content that never comes: they fault again, and get zeros.
            if let Err(error) = self.core.descriptor.wake(area.addr(first), part.len()) {
                log::debug!("waking the waiters of {part} failed: {error}");
            }
            given_back.map_err(|error| DiscardError::System { run: part, error })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("outcome", &self.core.status.outcome()).finish_non_exhaustive()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Poison first: then nobody waits for a page any more, and nobody gets a wrong one.
        self.cancel();
        self.waiter.stop();
        // On the supervisor's own thread, in the observer: nobody else wakes the loaders that are to end.
        self.core.window.wake();
        // The supervisor drops its own engine, in its observer: it goes on to its end then.
        let supervisor = self.supervisor.take().filter(|thread| thread.thread().id() != std::thread::current().id());
        for thread in self.threads.drain(..).chain(supervisor) {
            if thread.join().is_err() {
                log::error!("a thread of the engine had panicked");
            }
        }
        // The last owner of the feed: its threads end here, and do not call us any more.
        self.origin = None;
        stay_open(&self.core);
    }
}
