//! What the threads of an engine tell its supervisor, and what the supervisor tells everybody.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::EngineError;

/// How far an engine is.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Complete(Duration),
    Failed(EngineError),
}

/// Something for the supervisor to do.
#[derive(Debug)]
pub(crate) enum Task {
    FirstFault,
    PagesFailed(EngineError),
    Check,
    /// A freeze has ended where nothing may be waited for: take its protection off.
    Thaw,
    /// A page has been waited for longer than the limit, or the first one is waited for: look when that will be.
    Waits,
    Fail(EngineError),
}

#[derive(Debug, Default)]
struct Inbox {
    first_fault: bool,
    check: bool,
    thaw: bool,
    waits: bool,
    failed_pages: Vec<EngineError>,
    failure: Option<EngineError>,
}

const RUNNING: u8 = 0;
const COMPLETING: u8 = 1;
const FAILING: u8 = 2;
const ENDED: u8 = 3;

/// The state of the whole: read everywhere, without a lock.
#[derive(Debug, Default)]
pub(crate) struct Status {
    phase: AtomicU8,
    /// The supervisor waits for an install that is under way.
    interested: AtomicBool,
    /// Why the first pages that failed did, where the engine went on.
    failed_pages: OnceLock<EngineError>,
    inbox: Mutex<Inbox>,
    arrived: Condvar,
    outcome: Mutex<Option<Outcome>>,
    ended: Condvar,
    supervisor: OnceLock<ThreadId>,
    /// The source is being finished by us: that it ends is no news.
    source_finishes: AtomicBool,
}

/// How many errors of single pages are kept until the observer has seen them.
const MAX_FAILED_PAGES: usize = 64;

impl Status {
    /// Nothing has ended or is about to.
    pub(crate) fn running(&self) -> bool {
        self.phase.load(Ordering::Acquire) == RUNNING
    }

    /// What is missing is about to be poisoned, or is.
    pub(crate) fn failing(&self) -> bool {
        self.phase.load(Ordering::Acquire) == FAILING
    }

    /// From here on the engine is complete or failing; `false` if it was no longer running.
    pub(crate) fn begin_completion(&self) -> bool {
        self.phase.compare_exchange(RUNNING, COMPLETING, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Stops all installs; the supervisor will poison what is missing. The first error is the one that is told.
    pub(crate) fn fail(&self, error: EngineError) {
        let begun = self.phase.compare_exchange(RUNNING, FAILING, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if begun {
            self.tell(Task::Fail(error));
        }
    }

    /// Some pages are about to be poisoned, and the engine goes on.
    pub(crate) fn pages_fail(&self, error: &EngineError) {
        self.failed_pages.get_or_init(|| error.clone());
    }

    /// Why the first of them failed.
    pub(crate) fn failed_pages(&self) -> Option<&EngineError> {
        self.failed_pages.get()
    }

    /// Called before an install in flight is left to its installer, which tells when it settles.
    pub(crate) fn be_interested(&self) {
        self.interested.store(true, Ordering::SeqCst);
    }

    /// Whether somebody was interested; nobody is then.
    pub(crate) fn take_interest(&self) -> bool {
        self.interested.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn tell(&self, task: Task) {
        let mut inbox = self.inbox.lock();
        match task {
            Task::FirstFault => inbox.first_fault = true,
            Task::Check => inbox.check = true,
            Task::Thaw => inbox.thaw = true,
            Task::Waits => inbox.waits = true,
            Task::PagesFailed(error) if inbox.failed_pages.len() < MAX_FAILED_PAGES => inbox.failed_pages.push(error),
            Task::PagesFailed(_) => {}
            Task::Fail(error) => inbox.failure = Some(error),
        }
        self.arrived.notify_one();
    }

    /// The next thing to do, in order of urgency. Waits for it: until `deadline`, when waits are looked at.
    pub(crate) fn next_task(&self, deadline: Option<Instant>) -> Task {
        let mut inbox = self.inbox.lock();
        loop {
            if let Some(error) = inbox.failure.take() {
                return Task::Fail(error);
            }
            if std::mem::take(&mut inbox.thaw) {
                return Task::Thaw;
            }
            if std::mem::take(&mut inbox.first_fault) {
                return Task::FirstFault;
            }
            if let Some(error) = inbox.failed_pages.pop() {
                return Task::PagesFailed(error);
            }
            if std::mem::take(&mut inbox.check) {
                return Task::Check;
            }
            if std::mem::take(&mut inbox.waits) {
                return Task::Waits;
            }
            match deadline {
                None => self.arrived.wait(&mut inbox),
                Some(at) => inbox.waits = self.arrived.wait_until(&mut inbox, at).timed_out(),
            }
        }
    }

    /// Whether the source is being finished by us.
    pub(crate) fn source_finishes(&self) -> bool {
        self.source_finishes.load(Ordering::SeqCst)
    }

    /// To be said before the source is finished.
    pub(crate) fn finishing_source(&self) {
        self.source_finishes.store(true, Ordering::SeqCst);
    }

    /// Everything is there, and the memory is served on. `false` if the engine was no longer running.
    pub(crate) fn complete_armed(&self, after: Duration) -> bool {
        let mut slot = self.outcome.lock();
        let running = self.running();
        if running {
            slot.get_or_insert(Outcome::Complete(after));
            self.ended.notify_all();
        }
        running
    }

    pub(crate) fn end(&self, outcome: Outcome) {
        let mut slot = self.outcome.lock();
        self.phase.store(ENDED, Ordering::Release);
        slot.get_or_insert(outcome);
        self.ended.notify_all();
    }

    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.outcome.lock().clone()
    }

    /// This thread is the one that ends the engine.
    pub(crate) fn supervised_here(&self) {
        self.supervisor.get_or_init(|| std::thread::current().id());
    }

    /// Whether this thread is the one that ends the engine, so that nothing of that can be waited for here.
    pub(crate) fn on_supervisor(&self) -> bool {
        self.supervisor.get() == Some(&std::thread::current().id())
    }

    /// Waits for the end, at most until `deadline`; not at all on the thread that has to bring it about.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<Outcome> {
        let mut slot = self.outcome.lock();
        if self.on_supervisor() {
            return slot.clone();
        }
        while slot.is_none() {
            match deadline {
                None => self.ended.wait(&mut slot),
                Some(at) if self.ended.wait_until(&mut slot, at).timed_out() => break,
                Some(_) => {}
            }
        }
        slot.clone()
    }
}
