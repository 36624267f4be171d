//! Places where a thread waits until a test lets it go on: instead of sleeping and hoping.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

/// A gate that threads come to. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    /// How many may still pass although it is closed.
    passes: u64,
    waiting: usize,
    passed: u64,
}

impl Gate {
    /// A gate that is open until [`close`](Gate::close).
    #[must_use]
    pub fn open_at_first() -> Gate {
        let gate = Gate::default();
        gate.open();
        gate
    }

    /// A gate that is closed until [`open`](Gate::open).
    #[must_use]
    pub fn closed() -> Gate {
        Gate::default()
    }

    /// Lets everybody pass.
    pub fn open(&self) {
        self.0.state.lock().open = true;
        self.0.moved.notify_all();
    }

    /// Lets nobody pass any more.
    pub fn close(&self) {
        let mut state = self.0.state.lock();
        state.open = false;
        state.passes = 0;
    }

    /// Lets exactly `count` more pass.
    pub fn pass(&self, count: u64) {
        self.0.state.lock().passes += count;
        self.0.moved.notify_all();
    }

    /// How many have passed so far.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.0.state.lock().passed
    }

    /// How many threads wait at it now.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.state.lock().waiting
    }

    /// Waits until that many threads stand at the gate.
    pub fn wait_for(&self, threads: usize) {
        let mut state = self.0.state.lock();
        while state.waiting < threads {
            self.0.moved.wait(&mut state);
        }
    }

    /// Waits until `count` have passed in all.
    pub fn wait_for_passed(&self, count: u64) {
        let mut state = self.0.state.lock();
        while state.passed < count {
            self.0.moved.wait(&mut state);
        }
    }

    /// Comes to the gate, and waits until it may pass.
    pub fn enter(&self) {
        let passed = self.enter_unless(&AtomicBool::new(false));
        debug_assert!(passed, "nobody cancels it");
    }

    /// The same, but turns back (`false`) when `cancelled` is set; who sets it calls [`wake`](Gate::wake) then.
    #[must_use]
    pub fn enter_unless(&self, cancelled: &AtomicBool) -> bool {
        let mut state = self.0.state.lock();
        state.waiting += 1;
        self.0.moved.notify_all();
        while !state.open && state.passes == 0 && !cancelled.load(Ordering::Acquire) {
            self.0.moved.wait(&mut state);
        }
        state.waiting -= 1;
        if cancelled.load(Ordering::Acquire) {
            return false;
        }
        if !state.open {
            state.passes -= 1;
        }
        state.passed += 1;
        self.0.moved.notify_all();
        true
    }

    /// Makes everybody at the gate look again.
    pub fn wake(&self) {
        let _state = self.0.state.lock();
        self.0.moved.notify_all();
    }
}
