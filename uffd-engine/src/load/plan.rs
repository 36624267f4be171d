//! Which pages the background asks for next: around recent faults first, then the rest in order.
//!
//! The cursor only decides where to look next. Whether everything is there is read from the page states.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use page_units::{ByteLen, PageCount, PageRun};
use parking_lot::Mutex;

use super::rate::Bucket;
use crate::options::Background;

/// How often at least a pause of a loader whose rate is limited ends, to look for a change.
const NAP: Duration = Duration::from_millis(5);

/// What the loaders of one engine share.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(super) cursor: Mutex<Cursor>,
    paused: AtomicBool,
    pub(super) piece: PageCount,
    rate: Option<Mutex<Bucket>>,
    pub(super) active: Mutex<usize>,
}

#[derive(Debug, Default)]
pub(super) struct Cursor {
    pub(super) area: usize,
    pub(super) granule: usize,
    /// What comes after the latest fault.
    pub(super) following: Option<(usize, PageRun)>,
}

impl Plan {
    pub(crate) fn new(options: &Background) -> Plan {
        Plan {
            cursor: Mutex::default(),
            paused: AtomicBool::new(options.paused),
            piece: options.piece,
            rate: options.rate.map(|rate| Mutex::new(Bucket::new(rate))),
            active: Mutex::new(options.threads),
        }
    }

    pub(crate) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// Begins again at the start: something was still missing.
    pub(crate) fn rewind(&self) {
        *self.cursor.lock() = Cursor::default();
    }

    /// One turn of a loader, in granules.
    pub(super) fn granules(&self, granule: PageCount) -> usize {
        ByteLen(self.piece.0 / granule.0).get().max(1)
    }

    /// Counts what was asked for against the rate.
    pub(super) fn asked(&self, len: ByteLen) {
        if let Some(rate) = &self.rate {
            rate.lock().take(len);
        }
    }

    /// Whether a loader has to wait, and for how long at most; `room`: the window has some.
    pub(super) fn hold(&self, room: bool) -> Option<Option<Duration>> {
        if self.paused.load(Ordering::SeqCst) || !room {
            return Some(None);
        }
        let debt = self.rate.as_ref()?.lock().debt()?;
        Some(Some(debt.min(NAP)))
    }
}
