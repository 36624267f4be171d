//! The preallocated buffers into which pages are copied before their writers go on.

use std::io;

use page_source::ByteLen;
use parking_lot::Mutex;

use crate::sys::memory::Scratch;

/// A copy of a granule that waits to be delivered.
#[derive(Debug)]
pub(crate) struct Copied {
    pub(crate) area: usize,
    pub(crate) granule: usize,
    pub(crate) buffer: Scratch,
}

#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Scratch>>,
    full: Mutex<Vec<Copied>>,
}

impl Pool {
    /// So many buffers of one granule each, all of them touched: nothing is allocated while a writer waits.
    pub(crate) fn new(count: usize, granule: ByteLen) -> io::Result<Pool> {
        let buffers = (0..count.max(1)).map(|_| {
            let mut buffer = Scratch::new(granule)?;
            buffer.bytes_mut(0, granule.get()).fill(0xff);
            Ok(buffer)
        });
        let count = count.max(1);
        Ok(Pool { free: Mutex::new(buffers.collect::<io::Result<_>>()?), full: Mutex::new(Vec::with_capacity(count)) })
    }

    pub(crate) fn take(&self) -> Option<Scratch> {
        self.free.lock().pop()
    }

    pub(crate) fn give_back(&self, buffer: Scratch) {
        self.free.lock().push(buffer);
    }

    /// Puts a copy into the queue; says whether the queue was empty.
    pub(crate) fn push(&self, copied: Copied) -> bool {
        let mut full = self.full.lock();
        full.push(copied);
        full.len() == 1
    }

    /// All copies that wait, oldest first.
    pub(crate) fn drain(&self) -> Vec<Copied> {
        let mut full = self.full.lock();
        let capacity = full.capacity();
        std::mem::replace(&mut *full, Vec::with_capacity(capacity))
    }
}
