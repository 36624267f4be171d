//! Frozen memory, as a source that pushes each page once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder as Thread, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use page_source::{
    BlockId, ByteLen, Content, End, Feed, HostAddr, Layout, PageCount, PageIndex, PageRun, PageSink, PageSize,
    PageSource, SinkError, SourceError, Span, Urgency,
};
use parking_lot::{Condvar, Mutex, RwLock};

use super::owner::Owner;
use super::page_table::PageTable;
use super::pages::Saved;
use super::pool::Pool;
use super::saver;
use crate::core::Place;
use crate::region::Region;
use crate::sys::memory::Scratch;
use crate::{EngineError, PausePoint};

/// A region with what of it is saved.
#[derive(Debug)]
pub(crate) struct Zone {
    pub(crate) region: Region,
    pub(crate) saved: Saved,
    pub(crate) granule: PageSize,
    /// Whether the freeze has registered it, and nobody else.
    pub(crate) registered: AtomicBool,
}

impl Zone {
    pub(crate) fn addr(&self, granule: usize) -> HostAddr {
        self.region.start + self.len_of(granule)
    }

    pub(crate) fn len_of(&self, granules: usize) -> ByteLen {
        ByteLen(granules as u64 * self.granule.bytes().0)
    }

    pub(crate) fn pages(&self, first: usize, granules: usize) -> PageRun {
        let per = self.granule.pages().0;
        let page = self.region.run.first + PageCount(first as u64 * per);
        PageRun::new(self.region.run.block, page, PageCount(granules as u64 * per))
    }
}

/// What was done while memory was frozen.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct FreezeStats {
    /// Write faults served: pages whose content was copied away for a writer.
    pub write_faults: u64,
    /// Faults on pages that did not exist yet, which are zero in the snapshot.
    pub hole_faults: u64,
    /// Writers that waited because the pool was full.
    pub waits_for_pool: u64,
    /// 4 KiB pages of content delivered.
    pub pages: u64,
    /// 4 KiB pages of zeros.
    pub zero_pages: u64,
    /// Of all these pages, those that were still missing in memory and were taken from the source that it is loaded from.
    pub pages_from_source: u64,
}

/// Why frozen memory could not be delivered whole. The guest goes on, and its memory is as it should be.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrozenError {
    /// The sink takes no more.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The guest gave back memory that was not saved yet.
    #[error(
        "pages at {start}..{end} were given back (a balloon?) before they were saved: hold discards off while a snapshot is taken"
    )]
    Discarded {
        /// First byte.
        start: HostAddr,
        /// The byte after the last.
        end: HostAddr,
    },
    /// The kernel refused something.
    #[error("{what} at {at} failed: {errno}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Where.
        at: HostAddr,
        /// What the kernel said.
        errno: Errno,
    },
    /// The memory is still being loaded, and its source has no content for pages that are missing.
    #[error("{run}, still missing in memory: {error}")]
    Source {
        /// The pages, as the source counts them.
        run: PageRun,
        /// What the source says.
        #[source]
        error: SourceError,
    },
    /// The source that the memory is being loaded from is not what it was: nothing that came from it can be trusted.
    #[error("the source that the memory is loaded from has changed: {0}")]
    Changed(#[source] SourceError),
    /// The memory is still being loaded, and that has failed or was given up.
    #[error("the engine that loads the memory has ended: {0}")]
    Engine(#[source] Box<EngineError>),
    /// The content of pages could not be loaded: they are poisoned.
    #[error("{0} could not be loaded, and has no content")]
    Poisoned(PageRun),
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
}

/// So long the thread that saves sleeps at most where it waits for an install that is under way.
const MOMENT: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) owner: Owner,
    pub(crate) zones: Vec<Zone>,
    pub(crate) layout: Layout,
    pub(crate) pool: Pool,
    pub(crate) page_table: PageTable,
    zeros: Scratch,
    over: AtomicBool,
    /// Granules whose writers wait because the pool is full.
    pub(crate) parked: Mutex<Vec<(usize, usize)>>,
    populated: RwLock<Vec<PageRun>>,
    pub(crate) write_faults: AtomicU64,
    pub(crate) hole_faults: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    pub(crate) from_source: AtomicU64,
    outcome: Mutex<Option<Result<(), FrozenError>>>,
    ended: Condvar,
    started: AtomicBool,
    /// Something may have changed for the thread that saves.
    work: Mutex<bool>,
    work_arrived: Condvar,
    #[cfg(feature = "pause-points")]
    pub(crate) pauses: std::sync::OnceLock<crate::pause::Pauses>,
}

impl Shared {
    pub(crate) fn new(
        owner: Owner,
        zones: Vec<Zone>,
        layout: Layout,
        pool: Pool,
        page_table: PageTable,
    ) -> nix::Result<Shared> {
        let zero = || AtomicU64::new(0);
        Ok(Shared {
            owner,
            zones,
            layout,
            pool,
            page_table,
            zeros: Scratch::new(PageSize::HUGE.bytes()).map_err(|_| Errno::ENOMEM)?,
            over: AtomicBool::new(false),
            parked: Mutex::default(),
            populated: RwLock::default(),
            write_faults: zero(),
            hole_faults: zero(),
            waits: zero(),
            pages: zero(),
            zero_pages: zero(),
            from_source: zero(),
            outcome: Mutex::default(),
            ended: Condvar::new(),
            started: AtomicBool::new(false),
            work: Mutex::default(),
            work_arrived: Condvar::new(),
            #[cfg(feature = "pause-points")]
            pauses: std::sync::OnceLock::new(),
        })
    }

    /// Here a test can hold the thread.
    #[cfg(feature = "pause-points")]
    pub(crate) fn pause(&self, at: PausePoint) {
        if let Some(pauses) = self.pauses.get() {
            pauses.at(at);
        }
    }

    /// Nothing.
    #[cfg(not(feature = "pause-points"))]
    #[inline(always)]
    pub(crate) fn pause(&self, _: PausePoint) {}

    /// A granule of zeros, for the kernel to copy.
    pub(crate) fn zeros(&self) -> *const u8 {
        self.zeros.as_ptr()
    }

    pub(crate) fn note_populated(&self, runs: &[PageRun]) {
        let mut populated = self.populated.write();
        if populated.is_empty() {
            populated.extend_from_slice(runs);
            populated.sort_by_key(|run| (run.block, run.first));
        }
    }

    /// Whether the file behind shared memory held a page at the freeze point.
    pub(crate) fn in_file(&self, run: PageRun) -> Vec<bool> {
        let populated = self.populated.read();
        let mut exists = vec![false; run.len().to_pages().to_bytes().get() >> page_source::PAGE_SHIFT];
        // They are sorted and do not overlap: the first that may reach into it, and on.
        let before = |known: &PageRun| (known.block, known.end()) <= (run.block, run.first);
        let from = populated.partition_point(before);
        let here = |known: &&PageRun| (known.block, known.first) < (run.block, run.end());
        for known in populated.iter().skip(from).take_while(here) {
            let here = known.intersect(run);
            for page in here.iter() {
                exists[ByteLen((page - run.first).0).get()] = true;
            }
        }
        exists
    }

    /// See [`Owner::settle`].
    pub(crate) fn settle(&self) {
        self.owner.settle(|| self.has_ended());
    }

    /// Whether nothing of it is needed any more: neither its protection nor its threads.
    pub(crate) fn has_ended(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Whether an install of so many granules has to be write-protected, since not all of them are saved.
    pub(crate) fn protects(&self, at: Place, granules: usize) -> bool {
        let saved = &self.zones[at.area].saved;
        (at.granule..at.granule + granules).any(|granule| !saved.may_change(granule))
    }

    pub(crate) fn wake_saver(&self) {
        *self.work.lock() = true;
        self.work_arrived.notify_all();
    }

    /// The end: lets the memory go, and says how it ended. Only the first end counts.
    pub(crate) fn end(&self, outcome: Result<(), FrozenError>) {
        if self.over.swap(true, Ordering::SeqCst) {
            return;
        }
        self.owner.let_go(self, outcome.is_ok());
        *self.outcome.lock() = Some(outcome);
        self.ended.notify_all();
        self.owner.stop();
        self.wake_saver();
    }

    /// How it ended, when it has.
    pub(crate) fn wait(&self) -> Result<(), FrozenError> {
        let mut slot = self.outcome.lock();
        loop {
            match &*slot {
                Some(outcome) => return outcome.clone(),
                None => self.ended.wait(&mut slot),
            }
        }
    }

    /// Waits until there may be something for the thread that saves, or for a moment.
    pub(crate) fn wait_for_work(&self) {
        let mut work = self.work.lock();
        if !std::mem::take(&mut *work) {
            self.work_arrived.wait_for(&mut work, MOMENT);
        }
        *work = false;
    }
}

/// Memory as it was at the freeze point. Delivers each page once: start it once.
///
/// # Dropping
/// Dropping it takes the protection off; the guest goes on. What was not delivered by then never will be.
#[derive(Debug)]
pub struct Frozen {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

impl Frozen {
    /// Waits until everything is delivered, or can't be.
    ///
    /// # Errors
    /// If something went wrong; the guest goes on all the same.
    pub fn wait(&self) -> Result<FreezeStats, FrozenError> {
        self.shared.wait().map(|()| self.stats())
    }

    /// Takes the protection off and ends the delivery.
    pub fn cancel(&self) {
        self.shared.end(Err(FrozenError::Cancelled));
        // Somebody else may be at it.
        let _ = self.shared.wait();
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> FreezeStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FreezeStats {
            write_faults: of(&self.shared.write_faults),
            hole_faults: of(&self.shared.hole_faults),
            waits_for_pool: of(&self.shared.waits),
            pages: of(&self.shared.pages),
            zero_pages: of(&self.shared.zero_pages),
            pages_from_source: of(&self.shared.from_source),
        }
    }

    pub(crate) fn release(&mut self) {
        self.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a write-fault handler had panicked");
            }
        }
        self.shared.owner.forget(&self.shared);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.release();
    }
}

impl PageSource for Frozen {
    fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        let pages = self.shared.layout.get(block).map_or(0, |block| block.pages().0);
        Span { content: Content::Unknown, pages: PageCount(pages.saturating_sub(first.0)) }
    }

    fn repeatable(&self) -> bool {
        false
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let stopped = |reason: String| SourceError::Stopped { reason };
        if self.shared.started.swap(true, Ordering::AcqRel) {
            return Err(stopped("frozen memory is delivered once".into()));
        }
        let shared = Arc::clone(&self.shared);
        let thread = Thread::new().name("uffd-save".into()).spawn(move || {
            shared.end(saver::run(&shared, &*sink));
            // The end that counts, which need not be that one: nothing is published that was cancelled.
            let reason = match shared.wait() {
                Ok(()) => return sink.end(End::Complete),
                Err(error) => error.to_string(),
            };
            sink.end(End::Broken(SourceError::Stopped { reason }));
        });
        let thread = thread.map_err(|error| stopped(format!("no thread: {error}")))?;
        Ok(Box::new(FrozenFeed { shared: Arc::clone(&self.shared), thread: Some(thread) }))
    }
}

/// The flow of frozen pages.
#[derive(Debug)]
struct FrozenFeed {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Feed for FrozenFeed {
    /// Every page comes without being asked for, those that are written first.
    fn request(&self, _: PageRun, _: Urgency) {}

    fn alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for FrozenFeed {
    fn drop(&mut self) {
        self.shared.end(Err(FrozenError::Cancelled));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that saves frozen memory had panicked");
        }
    }
}
