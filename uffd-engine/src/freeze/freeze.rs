//! What all threads that deliver frozen memory, or serve its writers, have in common.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, Layout, PageCount, PageRun, PageSize};
use parking_lot::{Condvar, Mutex, RwLock};

use super::frozen::FrozenError;
use super::owner::Owner;
use super::page_table::PageTable;
use super::pool::Pool;
use super::saved::Saved;
use crate::memory::region::Region;
use crate::pause::PausePoint;
use crate::sys::memory::Scratch;

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
    pub(super) started: AtomicBool,
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

    pub(super) fn replace_populated(&self, runs: &[PageRun]) {
        self.populated.write().clear();
        self.note_populated(runs);
    }

    pub(crate) fn is_loading(&self) -> bool {
        matches!(self.owner, Owner::Engine { .. })
    }

    /// Whether the file behind shared memory held a page at the freeze point.
    pub(crate) fn in_file(&self, run: PageRun) -> Vec<bool> {
        let populated = self.populated.read();
        let mut exists = vec![false; run.len().to_pages().to_bytes().get() >> page_units::PAGE_SHIFT];
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
