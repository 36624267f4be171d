//! Which vCPUs run and which should: what their threads and their owner share.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};

use super::VcpuError;
use crate::sys;

/// What a vCPU is doing.
#[derive(Debug)]
pub(super) enum Phase {
    Running,
    Paused,
    Failed(Arc<VcpuError>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    Run,
    Pause,
    End,
}

/// What the threads and their owner share.
pub(super) struct Group {
    /// Which vCPUs run and which should. Held for moments only, and never while anything waits.
    pub(super) table: Mutex<Vec<Entry>>,
    /// Any change of the table.
    pub(super) changed: Condvar,
    /// Somebody wants something other than running: looked at after each exit.
    pub(super) attention: AtomicBool,
    /// How often something was asked of them: a holder sees by it whether it may still let them go.
    /// Changes with the table locked.
    asked: AtomicU64,
    /// What interrupts a vCPU.
    kick_signal: i32,
}

pub(super) struct Entry {
    pub(super) wanted: Wanted,
    pub(super) phase: Phase,
    /// It paused because a device stopped it (or it halted), not only because it was asked to.
    pub(super) by_device: bool,
    /// The thread, from when it has its signals under control until just before it ends.
    pub(super) thread: Option<i32>,
}

impl Entry {
    fn new(wanted: Wanted) -> Entry {
        Entry { wanted, phase: Phase::Paused, by_device: false, thread: None }
    }
}

impl Group {
    pub(super) fn new(vcpus: usize, wanted: Wanted, kick_signal: i32) -> Group {
        Group {
            table: Mutex::new(std::iter::repeat_with(|| Entry::new(wanted)).take(vcpus).collect()),
            changed: Condvar::new(),
            attention: AtomicBool::new(wanted != Wanted::Run),
            asked: AtomicU64::new(0),
            kick_signal,
        }
    }

    /// There are `vcpus` vCPUs, of which only the first has a thread yet. All are to do this.
    pub(super) fn prepare(&self, vcpus: usize, wanted: Wanted) {
        let mut table = self.table.lock();
        table.resize_with(vcpus, || Entry::new(wanted));
        table.iter_mut().for_each(|entry| entry.wanted = wanted);
        self.attention.store(wanted != Wanted::Run, Ordering::SeqCst);
    }

    /// Changes what all vCPUs are to do, and interrupts those that are in `KVM_RUN`.
    pub(super) fn want(&self, wanted: Wanted) {
        let mut table = self.table.lock();
        self.asked.fetch_add(1, Ordering::Relaxed);
        for entry in table.iter_mut().filter(|entry| entry.wanted != Wanted::End) {
            entry.wanted = wanted;
            entry.by_device &= wanted != Wanted::Run;
        }
        self.attention.store(wanted != Wanted::Run, Ordering::SeqCst);
        self.changed.notify_all();
        if wanted != Wanted::Run {
            self.kick(&table);
        }
    }

    /// Asks those that run to stop for a moment.
    pub(super) fn hold(&self) -> Hold {
        let mut table = self.table.lock();
        let vcpus = table.iter_mut().map(|entry| {
            let runs = entry.wanted == Wanted::Run;
            if runs {
                entry.wanted = Wanted::Pause;
            }
            runs
        });
        let vcpus = vcpus.collect();
        self.attention.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        self.kick(&table);
        Hold { vcpus, asked: self.asked.load(Ordering::Relaxed) }
    }

    /// Lets those go on that were held, unless somebody asked for something else meanwhile, one of them has failed, or
    /// a device has stopped them.
    pub(super) fn let_go(&self, hold: &Hold) {
        let mut table = self.table.lock();
        if self.asked.load(Ordering::Relaxed) != hold.asked || failure(&table).is_some() {
            return;
        }
        for (entry, _) in table.iter_mut().zip(&hold.vcpus).filter(|(_, held)| **held) {
            if entry.wanted == Wanted::Pause && !entry.by_device {
                entry.wanted = Wanted::Run;
            }
        }
        let all = table.iter().all(|entry| entry.wanted == Wanted::Run);
        self.attention.store(!all, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Interrupts all vCPUs. The table is locked, so no thread ends meanwhile.
    pub(super) fn kick(&self, table: &[Entry]) {
        table.iter().filter_map(|entry| entry.thread).for_each(|thread| sys::kick(thread, self.kick_signal));
    }
}

/// vCPUs that were stopped for a moment.
#[derive(Debug)]
pub(super) struct Hold {
    /// Which ones ran.
    vcpus: Vec<bool>,
    asked: u64,
}

/// Asks a machine's vCPUs to stop, from anywhere, without waiting. Does not keep the machine alive.
#[derive(Clone)]
pub struct StopHandle {
    group: Weak<Group>,
}

impl fmt::Debug for StopHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StopHandle").finish_non_exhaustive()
    }
}

impl StopHandle {
    pub(super) fn of(group: &Arc<Group>) -> StopHandle {
        StopHandle { group: Arc::downgrade(group) }
    }

    /// Asks all vCPUs to stop, as [`Vcpus::pause`](super::Vcpus::pause) does, but does not wait.
    pub fn stop(&self) {
        if let Some(group) = self.group.upgrade() {
            group.want(Wanted::Pause);
        }
    }
}

/// Whether a vCPU does not run, and will not.
pub(super) fn stopped(entry: &Entry) -> bool {
    entry.wanted != Wanted::Run && !matches!(entry.phase, Phase::Running)
}

/// Why one of them can't go on.
pub(super) fn failure(table: &[Entry]) -> Option<Arc<VcpuError>> {
    table.iter().find_map(|entry| match &entry.phase {
        Phase::Failed(error) => Some(Arc::clone(error)),
        Phase::Running | Phase::Paused => None,
    })
}
