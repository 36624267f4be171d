//! The file that a live snapshot becomes, and how that ended.

use std::time::Instant;

use mapped_ram::Writer;
use page_files::MappedRamSink;
use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError};
use page_units::{PageCount, PageRun};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::ram::FreezeClaim;

/// What the end of the flow needs, and does away with.
#[derive(Debug)]
struct Open {
    file: MappedRamSink,
    device_state: Vec<u8>,
    _claim: FreezeClaim,
}

/// Writes the file. At the end, good or bad, everything that belongs to the snapshot is let go: an unfinished file goes
/// away, and the next snapshot may begin.
#[derive(Debug)]
pub(super) struct LiveSink {
    open: RwLock<Option<Open>>,
    /// How many pages the file has, or why there is none.
    outcome: Mutex<Option<Result<PageCount, SinkError>>>,
    ended: Condvar,
}

impl LiveSink {
    /// Writes the file through `writer`, with `device_state` behind the pages.
    pub(super) fn new(writer: Writer, claim: FreezeClaim, device_state: Vec<u8>) -> LiveSink {
        let open = Open { file: MappedRamSink::new(writer), device_state, _claim: claim };
        LiveSink { open: RwLock::new(Some(open)), outcome: Mutex::default(), ended: Condvar::new() }
    }

    /// Waits for the end, at most until `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<Result<PageCount, SinkError>> {
        let mut outcome = self.outcome.lock();
        while outcome.is_none() {
            match deadline {
                None => self.ended.wait(&mut outcome),
                Some(at) if self.ended.wait_until(&mut outcome, at).timed_out() => break,
                Some(_) => {}
            }
        }
        outcome.clone()
    }

    fn take(&self, take: impl FnOnce(&MappedRamSink) -> Reply) -> Reply {
        match &*self.open.read() {
            Some(open) => take(&open.file),
            None => SinkError::stopped("the file has ended").into(),
        }
    }
}

impl PageSink for LiveSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.take(|file| file.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(|file| file.zero(run))
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.take(|file| file.absent(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.take(|file| file.failed(run, error))
    }

    fn end(&self, end: End) {
        let Some(open) = self.open.write().take() else { return };
        open.file.end(end);
        let published = open.file.publish(&open.device_state);
        let writer = open.file.writer();
        let stored = (0..).zip(writer.layout().blocks()).map(|(id, _)| writer.stored_pages(page_units::BlockId(id)).0);
        let outcome = published.map(|()| PageCount(stored.sum()));
        drop(open);
        *self.outcome.lock() = Some(outcome);
        self.ended.notify_all();
    }
}
