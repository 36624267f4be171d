//! Writing mapped-ram snapshot files.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mapped_ram::{CreateError, Writer};
use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError};
use page_units::{FileOffset, PageCount, PageRun};

use super::outcome::Outcome;

/// Writes a mapped-ram snapshot file through a [`Writer`]: stored pages go to their places, and zero pages stay
/// holes. It becomes visible when it is [published](MappedRamSink::publish). Pages may come from any number of threads.
#[derive(Debug)]
pub struct MappedRamSink {
    writer: Writer,
    outcome: Outcome,
    stored: AtomicU64,
    zero: AtomicU64,
}

impl MappedRamSink {
    /// A sink that writes through `writer`, whose layout the source must have.
    #[must_use]
    pub fn new(writer: Writer) -> MappedRamSink {
        MappedRamSink { writer, outcome: Outcome::default(), stored: AtomicU64::new(0), zero: AtomicU64::new(0) }
    }

    /// The writer: which pages are stored so far.
    #[must_use]
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// How many pages have come so far: with content, and zero. What comes twice counts twice.
    #[must_use]
    pub fn received(&self) -> (PageCount, PageCount) {
        (PageCount(self.stored.load(Ordering::Relaxed)), PageCount(self.zero.load(Ordering::Relaxed)))
    }

    /// How the flow ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.outcome.ended()
    }

    /// Why the file could not be written, if so, whatever the source did.
    #[must_use]
    pub fn refused(&self) -> Option<SinkError> {
        self.outcome.refused()
    }

    /// Writes what follows RAM, as [`Writer::finish`] wants it, makes the file durable and gives it its name: once the
    /// flow has ended with [`End::Complete`].
    ///
    /// # Errors
    /// If it has not, or that fails. There is no file then, or the one that was there before.
    pub fn publish(&self, device_state: &[u8]) -> Result<(), SinkError> {
        self.outcome.publish(|| {
            self.writer.finish(device_state).map_err(|error| match error {
                CreateError::Write { at, error, .. } => self.write_error(at, error),
                CreateError::File(error) => SinkError::File(Arc::new(error)),
                error => SinkError::stopped(error),
            })
        })
    }

    fn no_place(&self, run: PageRun) -> Reply {
        let path = self.writer.path().display();
        self.outcome.fail(SinkError::stopped(format_args!("{path} has no place for {run}"))).into()
    }

    fn write_error(&self, offset: FileOffset, error: io::Error) -> SinkError {
        SinkError::Write { target: self.writer.path().display().to_string(), offset, error: Arc::new(error) }
    }
}

impl PageSink for MappedRamSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        let Some(offset) = self.writer.data_offset(run).filter(|_| bytes.len() == run.len()) else {
            return self.no_place(run);
        };
        match bytes.write_to(self.writer.file(), offset) {
            Ok(()) => {
                self.writer.mark_stored(run);
                self.stored.fetch_add(run.pages.0, Ordering::Relaxed);
                Reply::Taken
            }
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Reply::Unreadable(run),
            Err(error) => self.outcome.fail(self.write_error(offset, error)).into(),
        }
    }

    fn zero(&self, run: PageRun) -> Reply {
        // What was never marked as stored is zero.
        match self.writer.data_offset(run) {
            Some(_) => {
                self.zero.fetch_add(run.pages.0, Ordering::Relaxed);
                Reply::Taken
            }
            None => self.no_place(run),
        }
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.outcome.absent(run).into()
    }

    fn failed(&self, _: PageRun, error: SourceError) -> Reply {
        self.outcome.lacks(error).into()
    }

    fn end(&self, end: End) {
        self.outcome.end(end);
    }
}
