//! Faults that have to be served again, after an event was read.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::place::Place;

/// Looked at after every fault, and nearly always empty: that costs no lock.
#[derive(Debug, Default)]
pub(crate) struct Retry {
    some: AtomicBool,
    faults: Mutex<Vec<Place>>,
    writes: Mutex<Vec<Place>>,
}

impl Retry {
    /// Missing and minor faults.
    pub(crate) fn faults(&self, places: impl IntoIterator<Item = Place>) {
        self.faults.lock().extend(places);
        self.some.store(true, Ordering::Release);
    }

    /// A write fault.
    pub(crate) fn write(&self, place: Place) {
        self.writes.lock().push(place);
        self.some.store(true, Ordering::Release);
    }

    /// Whether there are any. A handler sees at least its own.
    pub(crate) fn some(&self) -> bool {
        self.some.load(Ordering::Acquire)
    }

    /// All of them: faults, and write faults.
    pub(crate) fn take(&self) -> (Vec<Place>, Vec<Place>) {
        // First: what is added meanwhile is seen next time.
        self.some.store(false, Ordering::SeqCst);
        (std::mem::take(&mut self.faults.lock()), std::mem::take(&mut self.writes.lock()))
    }
}
