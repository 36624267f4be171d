//! What all threads that deliver frozen memory, or serve its writers, have in common.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use page_units::{HostAddr, Layout, PageSize};
use parking_lot::{Condvar, Mutex};

use super::error::FrozenError;
use super::known::Known;
use super::owner::{By, Owner};
use super::pool::Pool;
use super::populate::Populated;
use super::zone::Zone;
use crate::pause::PausePoint;
use crate::sys::ksm;
use crate::sys::memory::Scratch;

/// How long the arming tries at most, while discards go on.
const ARM_LIMIT: Duration = Duration::from_secs(5);

/// The longest the saver sleeps before it looks again at an install in progress.
const MOMENT: Duration = Duration::from_millis(1);

#[derive(Debug)]
pub(crate) struct Freeze {
    pub(crate) owner: Owner,
    pub(crate) zones: Vec<Zone>,
    pub(crate) layout: Layout,
    pub(crate) pool: Pool,
    pub(super) populated: Populated,
    zeros: Scratch,
    over: AtomicBool,
    /// Granules whose writers wait because the pool is full.
    pub(crate) parked: Mutex<Vec<(usize, usize)>>,
    pub(super) known: Known,
    pub(super) arm_limit: Duration,
    pub(crate) write_faults: AtomicU64,
    pub(crate) hole_faults: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) pages: AtomicU64,
    pub(crate) zero_pages: AtomicU64,
    pub(crate) from_source: AtomicU64,
    outcome: Mutex<Option<Result<(), FrozenError>>>,
    ended: Condvar,
    /// Something may have changed for the thread that saves.
    work: Mutex<bool>,
    work_arrived: Condvar,
    #[cfg(feature = "pause-points")]
    pub(crate) pauses: std::sync::OnceLock<crate::pause::Pauses>,
}

impl Freeze {
    pub(super) fn new(
        owner: Owner,
        zones: Vec<Zone>,
        layout: Layout,
        pool: Pool,
        (populated, known): (Populated, Known),
    ) -> nix::Result<Freeze> {
        let zero = || AtomicU64::new(0);
        Ok(Freeze {
            owner,
            zones,
            layout,
            pool,
            populated,
            zeros: Scratch::new(PageSize::HUGE.bytes()).map_err(|_| Errno::ENOMEM)?,
            over: AtomicBool::new(false),
            parked: Mutex::default(),
            known,
            arm_limit: ARM_LIMIT,
            write_faults: zero(),
            hole_faults: zero(),
            waits: zero(),
            pages: zero(),
            zero_pages: zero(),
            from_source: zero(),
            outcome: Mutex::default(),
            ended: Condvar::new(),
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

    /// Looks up which pages of shared memory there were, where that was not done at the freeze point.
    pub(super) fn look_up(&self) -> Result<(), FrozenError> {
        if self.known.is_exact() || matches!(self.owner.by(), By::Engine { .. }) {
            return Ok(());
        }
        let at = self.zones.first().map_or_else(HostAddr::default, |zone| zone.region.start);
        let shared = self.zones.iter().enumerate().filter(|(_, zone)| zone.region.shared);
        let runs = shared.map(|(number, zone)| self.populated.in_file(number, zone.region.run));
        let runs = runs.collect::<io::Result<Vec<_>>>();
        let runs = runs.map_err(|error| FrozenError::io("looking up which pages exist", at, &error))?;
        self.known.refine(&self.zones, runs.concat())
    }

    /// Equal pages of private memory may be merged again, if that is the rule of the process.
    pub(super) fn merge_again(&self) {
        for region in self.zones.iter().map(|zone| &zone.region).filter(|region| region.may_be_merged()) {
            ksm::merge_again(region.start, region.len());
        }
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
        self.owner.let_go(&self.zones, self, outcome.is_ok());
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
