//! Writing mapped-ram snapshot files.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use mapped_ram::{CreateError, Writer};
use page_units::{FileOffset, PageRun};
use parking_lot::Mutex;

use super::outcome::Outcome;
use page_source::{End, Flow, PageBytes, PageSink, SinkError, SourceError};

/// Writes a mapped-ram snapshot file through a [`Writer`]: stored pages go to their places, zero pages stay holes, and
/// [`End::Complete`] alone publishes the file. Pages may come from any number of threads.
#[derive(Debug)]
pub struct MappedRamSink {
    writer: Writer,
    device_state: Mutex<Option<Vec<u8>>>,
    outcome: Outcome,
}

impl MappedRamSink {
    /// A sink that writes through `writer`, whose layout the source must have.
    #[must_use]
    pub fn new(writer: Writer) -> MappedRamSink {
        MappedRamSink { writer, device_state: Mutex::new(None), outcome: Outcome::default() }
    }

    /// What is to follow RAM, as [`Writer::finish`] wants it: needed before the flow ends.
    pub fn set_device_state(&self, bytes: Vec<u8>) {
        *self.device_state.lock() = Some(bytes);
    }

    /// The writer: which pages are stored so far.
    #[must_use]
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// Whether the file is complete and has its name.
    ///
    /// # Errors
    /// Why not.
    pub fn outcome(&self) -> Result<(), SinkError> {
        self.outcome.get()
    }

    fn publish(&self) -> Result<(), SinkError> {
        let Some(device_state) = self.device_state.lock().take() else {
            return Err(SinkError::Stopped { reason: "there is no device state for the file".to_owned() });
        };
        self.writer.finish(&device_state).map_err(|error| match error {
            CreateError::Write { at, error, .. } => self.write_error(at, error),
            CreateError::File(error) => SinkError::File(Arc::new(error)),
            error => SinkError::Stopped { reason: error.to_string() },
        })
    }

    fn no_place(&self, run: PageRun) -> SinkError {
        let path = self.writer.path().display();
        self.outcome.fail(SinkError::Stopped { reason: format!("{path} has no place for {run}") })
    }

    fn write_error(&self, offset: FileOffset, error: io::Error) -> SinkError {
        SinkError::Write { target: self.writer.path().display().to_string(), offset, error: Arc::new(error) }
    }
}

impl PageSink for MappedRamSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        let Some(offset) = self.writer.data_offset(run).filter(|_| bytes.len() == run.len()) else {
            return ControlFlow::Break(self.no_place(run));
        };
        match bytes.write_to(self.writer.file(), offset) {
            Ok(()) => {
                self.writer.mark_stored(run);
                ControlFlow::Continue(())
            }
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => ControlFlow::Break(SinkError::Unreadable(run)),
            Err(error) => ControlFlow::Break(self.outcome.fail(self.write_error(offset, error))),
        }
    }

    fn zero(&self, run: PageRun) -> Flow {
        // What was never marked as stored is zero.
        match self.writer.data_offset(run) {
            Some(_) => ControlFlow::Continue(()),
            None => ControlFlow::Break(self.no_place(run)),
        }
    }

    fn failed(&self, _: PageRun, error: SourceError) -> Flow {
        ControlFlow::Break(self.outcome.lacks(error))
    }

    fn end(&self, end: End) {
        self.outcome.end(end, || self.publish());
    }
}
