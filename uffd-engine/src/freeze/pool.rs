//! The preallocated buffers into which pages are copied before their writers go on.

use std::io;
use std::ops::Range;

use page_units::ByteLen;
use parking_lot::Mutex;

use crate::sys::memory::{Piece, Scratch};

/// A copy of a granule that waits to be delivered.
#[derive(Debug)]
pub(crate) struct Copied {
    pub(crate) area: usize,
    pub(crate) granule: usize,
    pub(crate) buffer: Piece,
}

#[derive(Debug)]
pub(crate) struct Pool {
    count: usize,
    free: Mutex<Vec<Piece>>,
    /// Oldest first.
    full: Mutex<Vec<Copied>>,
}

impl Pool {
    /// Makes buffers of one granule each and touches them: nothing is allocated while a writer waits.
    pub(crate) fn new(count: usize, granule: ByteLen) -> io::Result<Pool> {
        let count = count.max(1);
        let len = granule.0.checked_mul(count as u64).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut memory = Scratch::new(ByteLen(len))?;
        memory.prefer_huge();
        memory.bytes_mut(0, ByteLen(len).get()).fill(0xff);
        let free = memory.split(granule.get());
        Ok(Pool { count, free: Mutex::new(free), full: Mutex::new(Vec::with_capacity(count)) })
    }

    pub(crate) fn take(&self) -> Option<Piece> {
        self.free.lock().pop()
    }

    pub(crate) fn give_back(&self, buffer: Piece) {
        self.free.lock().push(buffer);
    }

    /// Puts a copy into the queue; says whether the queue was empty.
    pub(crate) fn push(&self, copied: Copied) -> bool {
        let mut full = self.full.lock();
        full.push(copied);
        full.len() == 1
    }

    /// Whether less than half of it is left.
    pub(crate) fn runs_low(&self) -> bool {
        self.full.lock().len() > self.count / 2
    }

    /// Area and granule of the copy that has waited longest.
    pub(crate) fn oldest(&self) -> Option<(usize, usize)> {
        self.full.lock().first().map(|copied| (copied.area, copied.granule))
    }

    /// The copies of some granules, in their order.
    pub(crate) fn take_within(&self, area: usize, granules: &Range<usize>) -> Vec<Copied> {
        let within = |copied: &mut Copied| copied.area == area && granules.contains(&copied.granule);
        let mut found: Vec<_> = self.full.lock().extract_if(.., within).collect();
        found.sort_unstable_by_key(|copied| copied.granule);
        found
    }

    /// All copies that wait, oldest first.
    pub(crate) fn drain(&self) -> Vec<Copied> {
        let mut full = self.full.lock();
        let capacity = full.capacity();
        std::mem::replace(&mut *full, Vec::with_capacity(capacity))
    }
}
