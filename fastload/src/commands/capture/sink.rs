//! The file that is written, which nobody sees before QEMU too says that all is well.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use mapped_ram::Writer;
use page_files::MappedRamSink;
use page_source::{End, Flow, PageBytes, PageSink, SinkError, SourceError};
use page_units::{PageCount, PageRun};

/// Writes what comes, and keeps the end to itself.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) file: MappedRamSink,
    stored: AtomicU64,
    zero: AtomicU64,
    refused: Mutex<Option<SinkError>>,
    ended: Mutex<Option<End>>,
}

impl Held {
    pub(super) fn new(writer: Writer) -> Held {
        let file = MappedRamSink::new(writer);
        let (refused, ended) = (Mutex::new(None), Mutex::new(None));
        Held { file, stored: AtomicU64::new(0), zero: AtomicU64::new(0), refused, ended }
    }

    /// How many pages have come: stored ones, zero ones.
    pub(super) fn pages(&self) -> (PageCount, PageCount) {
        (PageCount(self.stored.load(Ordering::Relaxed)), PageCount(self.zero.load(Ordering::Relaxed)))
    }

    /// Why no more pages are taken, if so.
    pub(super) fn refused(&self) -> Option<SinkError> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn seen(&self, flow: Flow) -> Flow {
        if let ControlFlow::Break(error) = &flow {
            self.refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
        }
        flow
    }

    /// How it ended, if it has.
    pub(super) fn ended(&self) -> Option<End> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl PageSink for Held {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        self.stored.fetch_add(run.pages.0, Ordering::Relaxed);
        self.seen(self.file.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Flow {
        self.zero.fetch_add(run.pages.0, Ordering::Relaxed);
        self.seen(self.file.zero(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Flow {
        self.seen(self.file.failed(run, error))
    }

    fn end(&self, end: End) {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }
}
