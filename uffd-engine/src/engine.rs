//! A running engine.

use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use page_units::{Layout, PageCount, PageRun};

use crate::load::fetch;
use crate::load::intake::Intake;
use crate::load::load::Load;
use crate::load::status::Outcome;
use crate::memory::Place;
use crate::serve::wait::Waiter;
use crate::stats::Stats;
use crate::{DiscardError, EngineError, FreezeError, FreezeOptions, Freezer, Region};

/// Serves guest memory on demand, and brings in the rest in the background.
///
/// # Dropping
/// Dropping an engine that is not complete poisons everything that is missing, since without it the kernel would give
/// zeros without a word; then it ends its threads. An engine that is complete has nothing left to do: its memory is
/// ordinary memory, and dropping it changes nothing.
pub struct Engine {
    pub(crate) intake: Arc<Intake>,
    /// Until it is dropped: with it ends the flow of pages.
    pub(crate) load: Option<Arc<Load>>,
    pub(crate) waiter: Arc<Waiter>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) supervisor: Option<JoinHandle<()>>,
}

/// Pages that are waited for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Waiting {
    /// The pages: one, or a huge page.
    pub run: PageRun,
    /// How long already.
    pub time: Duration,
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

impl Engine {
    /// Waits until every page is in.
    ///
    /// With [`Background::off`](crate::Background::off), or while the background is paused, that may be never.
    ///
    /// # Errors
    /// If the engine has failed. What was missing then is poisoned. [`EngineError::OnObserver`] if it has not ended, and
    /// this is called by its observer.
    pub fn wait(&self) -> Result<Completion, EngineError> {
        self.finished(self.intake.status.wait(None)).unwrap_or(Err(EngineError::OnObserver))
    }

    /// As [`wait`](Engine::wait), for a limited time: `None` if it has not ended by then. Returns at once if it is called
    /// by the engine's observer.
    pub fn wait_for(&self, time: Duration) -> Option<Result<Completion, EngineError>> {
        self.finished(self.intake.status.wait(Instant::now().checked_add(time)))
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Result<Completion, EngineError>> {
        self.finished(self.intake.status.outcome())
    }

    /// Why the first of the pages is unavailable that are poisoned while the engine goes on
    /// ([`FailurePolicy::PoisonFailed`](crate::FailurePolicy::PoisonFailed)), if there are any.
    #[must_use]
    pub fn failed_pages(&self) -> Option<EngineError> {
        self.intake.status.failed_pages().cloned()
    }

    fn pause(&self, paused: bool) {
        if let Some(load) = &self.load {
            load.plan.pause(paused);
        }
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
        let load = self.load.as_ref().filter(|_| self.intake.status.running());
        load.map_or(PageCount(0), |load| load.missing())
    }

    /// Which pages a late source lets the guest wait for, and how long already. (A source that answers at once is waited
    /// for by a handler, inside of it.)
    #[must_use]
    pub fn waiting(&self) -> Vec<Waiting> {
        let waiting = |(place, time): (Place, Duration)| Waiting {
            run: self.intake.memory.area(place.area).pages(place.granule, 1),
            time,
        };
        self.intake.latencies.all().into_iter().map(waiting).collect()
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.intake.memory.counters.snapshot()
    }

    /// Stops loading in the background after the requests that are under way. Faults are served as before.
    pub fn pause_background(&self) {
        self.pause(true);
    }

    /// Goes on loading in the background.
    pub fn resume_background(&self) {
        self.pause(false);
        self.intake.window.wake();
    }

    /// Fails the engine: poisons what is missing, tells the observer, and returns when that is done; when it is called by
    /// the observer it returns at once, and that is done after the observer has returned. Nothing happens if it has ended
    /// already.
    pub fn cancel(&self) {
        self.intake.status.fail(EngineError::Cancelled);
        self.intake.status.wait(None);
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
        self.intake.discard(run)
    }
}

impl Engine {
    /// As [`Freezer::prepare`], for memory that this engine is still loading. Its own handlers serve the writers then;
    /// what the engine brings from the freeze point on comes write-protected, and what is missing is taken from its source
    /// as long as that may be [asked again](page_source::PageSource): it is not brought into the memory for it. Pages of
    /// a [one-shot](page_source::OneShot) source are waited for.
    ///
    /// `regions` are those of the engine, in any order, with the pages that `layout` gives them. While memory is frozen
    /// the engine does not become complete. Should it fail or be dropped, the freeze fails. An engine that becomes complete
    /// before the freeze point, even before this, is not needed any more: the memory is frozen without it, with the
    /// handlers of the options.
    ///
    /// # Errors
    /// If anything is missing, the regions are others, the engine has failed, or the kernel lacks write protection. Nothing
    /// has happened to the memory then.
    pub fn freezer(
        &self,
        regions: Vec<Region>,
        layout: Layout,
        options: &FreezeOptions,
    ) -> Result<Freezer, FreezeError> {
        let ended = || FreezeError::Load(Box::new(EngineError::Cancelled));
        let load = self.load.as_ref().ok_or_else(ended)?;
        Freezer::of_loading(&self.intake.memory, Arc::new(fetch::Source::of(load)), regions, layout, options)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("outcome", &self.intake.status.outcome()).finish_non_exhaustive()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Poison first: then nobody waits for a page any more, and nobody gets a wrong one.
        self.cancel();
        self.waiter.stop(&self.intake.memory);
        // On the supervisor's own thread, in the observer: nobody else wakes the loaders that are to end.
        self.intake.window.wake();
        // The supervisor drops its own engine, in its observer: it goes on to its end then.
        let supervisor = self.supervisor.take().filter(|thread| thread.thread().id() != std::thread::current().id());
        for thread in self.threads.drain(..).chain(supervisor) {
            if thread.join().is_err() {
                log::error!("a thread of the engine had panicked");
            }
        }
        // The last owner of the feed: its threads end here, and do not call us any more.
        self.load = None;
        self.intake.memory.stay_open();
    }
}
