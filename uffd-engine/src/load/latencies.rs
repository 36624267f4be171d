//! When the faults were read that wait for a source which answers late. Empty, and never locked, with a source that
//! answers at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use crate::memory::Place;

#[derive(Debug, Default)]
pub(crate) struct Latencies {
    count: AtomicUsize,
    since: Mutex<HashMap<Place, Instant>>,
}

impl Latencies {
    pub(crate) fn insert(&self, place: Place, since: Instant) {
        let mut map = self.since.lock();
        map.entry(place).or_insert(since);
        self.count.store(map.len(), Ordering::SeqCst);
    }

    /// Nobody waits there any more.
    pub(crate) fn forget(&self, place: Place) {
        let _ = self.remove(place);
    }

    pub(crate) fn remove(&self, place: Place) -> Option<Instant> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut map = self.since.lock();
        let since = map.remove(&place);
        self.count.store(map.len(), Ordering::SeqCst);
        since
    }
}
