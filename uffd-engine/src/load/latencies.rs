//! Which pages a late source lets a guest wait for, and since when. Empty, and never locked, with a source that answers at
//! once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::memory::Place;

#[derive(Debug)]
struct Wait {
    since: Instant,
    reported: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Latencies {
    count: AtomicUsize,
    waits: Mutex<HashMap<Place, Wait>>,
    /// How long a wait may be until it is reported.
    limit: Option<Duration>,
}

impl Latencies {
    pub(crate) fn new(limit: Option<Duration>) -> Latencies {
        Latencies { limit, ..Latencies::default() }
    }

    /// A fault was read then, and waits. Answers whether that is to be watched, and is the only one.
    pub(crate) fn insert(&self, place: Place, since: Instant) -> bool {
        let mut waits = self.waits.lock();
        waits.entry(place).or_insert(Wait { since, reported: false });
        self.count.store(waits.len(), Ordering::SeqCst);
        self.limit.is_some() && waits.values().filter(|wait| !wait.reported).take(2).count() == 1
    }

    /// Nobody waits there any more.
    pub(crate) fn forget(&self, place: Place) {
        let _ = self.remove(place);
    }

    pub(crate) fn remove(&self, place: Place) -> Option<Instant> {
        if self.count.load(Ordering::SeqCst) == 0 {
            return None;
        }
        let mut waits = self.waits.lock();
        let wait = waits.remove(&place);
        self.count.store(waits.len(), Ordering::SeqCst);
        wait.map(|wait| wait.since)
    }

    /// The pages that are waited for, and how long.
    pub(crate) fn all(&self) -> Vec<(Place, Duration)> {
        self.waits.lock().iter().map(|(&place, wait)| (place, wait.since.elapsed())).collect()
    }

    /// When the next wait is to be reported, if one is.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let limit = self.limit?;
        let waits = self.waits.lock();
        let next = waits.values().filter(|wait| !wait.reported).map(|wait| wait.since).min()?;
        next.checked_add(limit)
    }

    /// The waits that are to be reported now, each once.
    pub(crate) fn overdue(&self) -> Vec<(Place, Duration)> {
        let Some(limit) = self.limit else { return Vec::new() };
        let mut waits = self.waits.lock();
        let due = |(&place, wait): (&Place, &mut Wait)| {
            let time = wait.since.elapsed();
            if time < limit || wait.reported {
                return None;
            }
            wait.reported = true;
            Some((place, time))
        };
        waits.iter_mut().filter_map(due).collect()
    }
}
