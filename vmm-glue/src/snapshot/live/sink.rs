//! The file that a live snapshot becomes, and how that ended.

use std::ops::ControlFlow;
use std::time::Duration;

use mapped_ram::Writer;
use page_files::MappedRamSink;
use page_source::{End, Flow, PageBytes, PageSink, SinkError, SourceError};
use page_units::{PageCount, PageRun};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::ram::FreezeClaim;

/// What the end of the flow needs, and does away with.
#[derive(Debug)]
struct Open {
    file: MappedRamSink,
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
    pub(super) fn new(writer: Writer, claim: FreezeClaim) -> LiveSink {
        let open = Open { file: MappedRamSink::new(writer), _claim: claim };
        LiveSink { open: RwLock::new(Some(open)), outcome: Mutex::default(), ended: Condvar::new() }
    }

    pub(super) fn set_device_state(&self, state: Vec<u8>) {
        if let Some(open) = &*self.open.read() {
            open.file.set_device_state(state);
        }
    }

    /// Waits for the end, for a limited time.
    pub(super) fn wait(&self, limit: Duration) -> Option<Result<PageCount, SinkError>> {
        let mut outcome = self.outcome.lock();
        if outcome.is_none() {
            self.ended.wait_for(&mut outcome, limit);
        }
        outcome.clone()
    }

    fn take(&self, take: impl FnOnce(&MappedRamSink) -> Flow) -> Flow {
        match &*self.open.read() {
            Some(open) => take(&open.file),
            None => ControlFlow::Break(SinkError::Stopped { reason: "the file has ended".into() }),
        }
    }
}

impl PageSink for LiveSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        self.take(|file| file.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Flow {
        self.take(|file| file.zero(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Flow {
        self.take(|file| file.failed(run, error))
    }

    fn end(&self, end: End) {
        let Some(open) = self.open.write().take() else { return };
        open.file.end(end);
        let writer = open.file.writer();
        let stored = (0..).zip(writer.layout().blocks()).map(|(id, _)| writer.stored_pages(page_units::BlockId(id)).0);
        let outcome = open.file.outcome().map(|()| PageCount(stored.sum()));
        drop(open);
        *self.outcome.lock() = Some(outcome);
        self.ended.notify_all();
    }
}
