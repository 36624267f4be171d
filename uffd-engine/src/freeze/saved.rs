//! Which granules are saved.

use std::io;
use std::sync::atomic::Ordering;

use crate::sys::memory::Table;

const UNSAVED: u8 = 0;
const CLAIMED: u8 = 1;
const SAVED: u8 = 2;
/// It did not exist, its first toucher has an ordinary page, and the sink has not heard of it.
const HOLE: u8 = 3;

/// For each granule: not saved, being copied, or saved.
#[derive(Debug)]
pub(crate) struct Saved(Table);

impl Saved {
    pub(crate) fn new(granules: usize) -> io::Result<Saved> {
        Ok(Saved(Table::new(granules)?))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether somebody is copying it just now.
    pub(crate) fn claimed(&self, granule: usize) -> bool {
        self.0[granule].load(Ordering::Acquire) == CLAIMED
    }

    /// Whether the sink has it, or will have it from the pool.
    pub(crate) fn saved(&self, granule: usize) -> bool {
        self.0[granule].load(Ordering::Acquire) == SAVED
    }

    /// Whether its content at the freeze point is known, so that it may change.
    pub(crate) fn may_change(&self, granule: usize) -> bool {
        matches!(self.0[granule].load(Ordering::Acquire), SAVED | HOLE)
    }

    /// The caller is the one who saves it.
    pub(crate) fn claim(&self, granule: usize) -> bool {
        self.0[granule].compare_exchange(UNSAVED, CLAIMED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// A claimed granule is saved.
    pub(crate) fn done(&self, granule: usize) {
        self.0[granule].store(SAVED, Ordering::Release);
    }

    /// A claimed granule did not exist.
    pub(crate) fn hole(&self, granule: usize) {
        self.0[granule].store(HOLE, Ordering::Release);
    }

    /// A hole that was touched; the caller tells the sink.
    pub(crate) fn take_hole(&self, granule: usize) -> bool {
        self.0[granule].compare_exchange(HOLE, SAVED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// A claimed granule could not be saved now.
    pub(crate) fn give_back(&self, granule: usize) {
        self.0[granule].store(UNSAVED, Ordering::Release);
    }
}
