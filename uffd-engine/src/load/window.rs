//! How many pages were requested and have not been answered: the bounded window of the background.

use std::sync::atomic::{AtomicU64, Ordering};

use page_units::PageCount;
use parking_lot::{Condvar, Mutex};

#[derive(Debug)]
pub(crate) struct Window {
    pages: AtomicU64,
    window: u64,
    /// Loaders that wait for space in the window, for the end of a pause, or for time to pass.
    asleep: AtomicU64,
    lock: Mutex<()>,
    change: Condvar,
    /// No loader has anything left to request.
    all_requested: AtomicU64,
}

impl Window {
    pub(crate) fn new(window: PageCount) -> Window {
        Window {
            pages: AtomicU64::new(0),
            window: window.0,
            asleep: AtomicU64::new(0),
            lock: Mutex::new(()),
            change: Condvar::new(),
            all_requested: AtomicU64::new(0),
        }
    }

    pub(crate) fn requested(&self, pages: u64) {
        self.pages.fetch_add(pages, Ordering::AcqRel);
    }

    /// Some pages were answered; says whether that were the last ones.
    pub(crate) fn answered(&self, pages: u64) -> bool {
        if pages == 0 {
            return false;
        }
        let before = self.pages.fetch_sub(pages, Ordering::AcqRel);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        before == pages && self.all_requested()
    }

    pub(crate) fn none(&self) -> bool {
        self.pages.load(Ordering::Acquire) == 0
    }

    pub(crate) fn room(&self) -> bool {
        self.pages.load(Ordering::SeqCst) < self.window
    }

    pub(crate) fn all_requested(&self) -> bool {
        self.all_requested.load(Ordering::SeqCst) != 0
    }

    pub(crate) fn set_all_requested(&self, value: bool) {
        self.all_requested.store(u64::from(value), Ordering::SeqCst);
    }

    /// Wakes the loaders, to look again.
    pub(crate) fn wake(&self) {
        let _held = self.lock.lock();
        self.change.notify_all();
    }

    /// Sleeps until something changes, or for `at_most`, unless `ready` says that there is no need to.
    pub(crate) fn sleep(&self, at_most: Option<std::time::Duration>, ready: impl Fn() -> bool) {
        let mut held = self.lock.lock();
        self.asleep.fetch_add(1, Ordering::SeqCst);
        if !ready() {
            match at_most {
                Some(time) => drop(self.change.wait_for(&mut held, time)),
                None => self.change.wait(&mut held),
            }
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}
