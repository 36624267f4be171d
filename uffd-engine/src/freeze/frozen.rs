//! Frozen memory, as a source that pushes each page once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::thread::{Builder as Thread, JoinHandle};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use page_source::{
    BlockId, ByteLen, Content, End, Feed, HostAddr, Layout, PageCount, PageIndex, PageRun, PageSink, PageSize,
    PageSource, SinkError, SourceError, Span, Urgency,
};
use parking_lot::{Condvar, Mutex, RwLock};

use super::pages::{PageTable, Saved};
use super::pool::Pool;
use super::saver;
use crate::descriptor::Descriptor;
use crate::region::Region;
use crate::sys::memory::Scratch;

/// A region with what of it is saved.
#[derive(Debug)]
pub(crate) struct Zone {
    pub(crate) region: Region,
    pub(crate) saved: Saved,
    pub(crate) granule: PageSize,
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
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) descriptor: Descriptor,
    pub(crate) zones: Vec<Zone>,
    pub(crate) layout: Layout,
    pub(crate) pool: Pool,
    pub(crate) page_table: PageTable,
    zeros: Scratch,
    pub(crate) event: EventFd,
    pub(crate) stop: AtomicBool,
    /// Granules whose writers wait because the pool is full.
    pub(crate) parked: Mutex<Vec<(usize, usize)>>,
    populated: RwLock<Vec<PageRun>>,
    /// Of each handler: odd from before it reads messages until it has looked at the discards among them.
    turns: Box<[AtomicU64]>,
    pub(crate) write_faults: AtomicU64,
    pub(crate) hole_faults: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    outcome: Mutex<Option<Result<(), FrozenError>>>,
    ended: Condvar,
    started: AtomicBool,
    pub(crate) work: Mutex<()>,
    pub(crate) work_arrived: Condvar,
}

impl Shared {
    pub(crate) fn new(
        descriptor: Descriptor,
        zones: Vec<Zone>,
        layout: Layout,
        pool: Pool,
        page_table: PageTable,
        handlers: usize,
    ) -> nix::Result<Shared> {
        let zero = || AtomicU64::new(0);
        Ok(Shared {
            descriptor,
            zones,
            layout,
            pool,
            page_table,
            zeros: Scratch::new(PageSize::HUGE.bytes()).map_err(|_| Errno::ENOMEM)?,
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            stop: AtomicBool::new(false),
            parked: Mutex::default(),
            populated: RwLock::default(),
            turns: std::iter::repeat_with(zero).take(handlers).collect(),
            write_faults: zero(),
            hole_faults: zero(),
            waits: zero(),
            pages: zero(),
            zero_pages: zero(),
            outcome: Mutex::default(),
            ended: Condvar::new(),
            started: AtomicBool::new(false),
            work: Mutex::default(),
            work_arrived: Condvar::new(),
        })
    }

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

    /// A handler begins, or ends, to read messages and to look at the discards among them.
    pub(crate) fn turn(&self, handler: usize) {
        self.turns[handler].fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until every discard that may have taken effect is known. The kernel lets memory go as soon as a handler
    /// has read of it: what was copied, or found missing, after that is not what it was at the freeze point. So whoever
    /// has claimed a granule calls this after looking at it and before declaring it saved; a discard that is noticed
    /// until then fails the snapshot.
    pub(crate) fn settle(&self) {
        fence(Ordering::SeqCst);
        for turn in &self.turns {
            let now = turn.load(Ordering::SeqCst);
            while now % 2 == 1 && turn.load(Ordering::SeqCst) == now && !self.stopping() {
                std::thread::yield_now();
            }
        }
    }

    /// Ends the threads that serve faults.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        if let Err(errno) = self.event.write(1) {
            log::error!("waking the fault handlers failed: {errno}");
        }
        self.wake_saver();
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    pub(crate) fn wake_saver(&self) {
        let _held = self.work.lock();
        self.work_arrived.notify_all();
    }

    /// The end: lets the memory go, then says how it ended. Only the first end counts.
    pub(crate) fn end(&self, outcome: Result<(), FrozenError>) {
        let mut slot = self.outcome.lock();
        if slot.is_some() {
            return;
        }
        self.unregister();
        *slot = Some(outcome);
        self.ended.notify_all();
        drop(slot);
        self.stop();
    }

    pub(crate) fn outcome(&self) -> Option<Result<(), FrozenError>> {
        self.outcome.lock().clone()
    }

    /// Takes the protection off everything, and wakes whoever waits: after it too, see `Core::unregister`.
    fn unregister(&self) {
        for zone in &self.zones {
            let (start, len) = (zone.region.start, zone.region.len());
            if let Err(error) = self.descriptor.unregister(start, len) {
                log::debug!("unregistering {start} failed: {error}");
            }
            if let Err(error) = self.descriptor.wake(start, len) {
                log::debug!("waking the waiters of {start} failed: {error}");
            }
        }
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
        let mut slot = self.shared.outcome.lock();
        while slot.is_none() {
            self.shared.ended.wait(&mut slot);
        }
        let outcome = slot.clone().unwrap_or(Err(FrozenError::Cancelled));
        drop(slot);
        outcome.map(|()| self.stats())
    }

    /// Takes the protection off and ends the delivery.
    pub fn cancel(&self) {
        self.shared.end(Err(FrozenError::Cancelled));
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
        }
    }

    pub(crate) fn release(&mut self) {
        self.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a write-fault handler had panicked");
            }
        }
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
            let reason = match shared.outcome() {
                Some(Ok(())) => return sink.end(End::Complete),
                Some(Err(error)) => error.to_string(),
                None => "it has not ended".into(),
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
