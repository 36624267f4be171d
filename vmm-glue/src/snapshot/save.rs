//! Saving a stopped machine: all of it, at once, into a snapshot file.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mapped_ram::{CreateError, Writer};
use page_files::MappedRamSink;
use page_source::{PumpError, PumpOptions, SinkError, pump};
use page_units::{ByteLen, PageCount};
use vmstate::{Configuration, DeviceWriter, WriteError};

use crate::state::{Host, StateError};
use crate::sys::WritesFail;
use crate::{Machine, RamSource, StopError};

/// Not 0 and 1, which the stream's other sections have.
pub(crate) const FIRST_DEVICE: u32 = 2;

/// How to save.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SaveOptions {
    /// The machine type that the file names.
    pub machine: String,
    /// How many threads read memory and write the file.
    pub threads: usize,
    /// How long the vCPUs have to stop.
    pub stop_limit: Duration,
}

impl Default for SaveOptions {
    /// Machine `vmm-glue`, one thread, five seconds.
    fn default() -> SaveOptions {
        SaveOptions { machine: "vmm-glue".into(), threads: 1, stop_limit: Duration::from_secs(5) }
    }
}

impl SaveOptions {
    /// The file names this machine type.
    #[must_use]
    pub fn with_machine(mut self, machine: impl Into<String>) -> SaveOptions {
        self.machine = machine.into();
        self
    }

    /// As many threads read memory and write the file.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> SaveOptions {
        self.threads = threads;
        self
    }

    /// The vCPUs have this long to stop.
    #[must_use]
    pub fn with_stop_limit(mut self, limit: Duration) -> SaveOptions {
        self.stop_limit = limit;
        self
    }
}

/// What saving did.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Saved {
    /// Pages with content in the file.
    pub stored: PageCount,
    /// Pages that are zero.
    pub zero: PageCount,
    /// How long the device state is.
    pub state: ByteLen,
    /// How long it took, in all.
    pub took: Duration,
}

/// Why nothing was saved. There is no file then, or the one that was there before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The vCPUs did not stop, or one of them has failed.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// The memory is still being loaded.
    #[error("the guest's memory is still being loaded: wait for the engine before saving")]
    Loading,
    /// Some of the memory has no content.
    #[error("{0} pages of the guest's memory could not be loaded, and can not be saved")]
    Poisoned(PageCount),
    /// The state could not be taken.
    #[error(transparent)]
    State(#[from] StateError),
    /// The signals of writes that fail could not be blocked.
    #[error("blocking SIGXFSZ and SIGPIPE failed: {0}")]
    Signals(#[source] io::Error),
    /// Which pages exist could not be found out.
    #[error("looking up which pages exist failed: {0}")]
    Populated(#[source] io::Error),
    /// The file could not be begun.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The state does not fit a stream.
    #[error(transparent)]
    Encode(#[from] WriteError),
    /// Reading memory or writing the file failed.
    #[error(transparent)]
    Pump(#[from] PumpError),
    /// The file could not be finished.
    #[error(transparent)]
    Finish(#[from] SinkError),
}

/// Stops the vCPUs and writes everything to `path`. They stay stopped.
///
/// The memory must be complete: see [`Vm::save`](crate::Vm::save), which checks it.
///
/// # Errors
/// If anything fails, which no signal is: a limit on the length of files, too, is an error. Nothing is published then, and vCPUs that ran before run again.
pub fn save(machine: &dyn Machine, host: &Host, path: &Path, options: &SaveOptions) -> Result<Saved, SaveError> {
    let begun = Instant::now();
    let _writes = WritesFail::new().map_err(SaveError::Signals)?;
    let ram = machine.ram();
    let mut held = machine.hold(options.stop_limit)?;
    let mut devices = DeviceWriter::new(FIRST_DEVICE);
    devices.push(ram.section()?);
    for section in held.sections(host)? {
        devices.push(section);
    }
    let state = devices.finish(&options.machine)?;
    let length = ByteLen::of(state.len());

    let source = RamSource::new(Arc::clone(ram)).map_err(SaveError::Populated)?;
    let configuration = Configuration::new(options.machine.clone());
    let sink = Arc::new(MappedRamSink::new(Writer::create(path, &configuration, ram.layout().clone())?));
    let pumping = PumpOptions { threads: options.threads, find_zeros: true, ..PumpOptions::default() };
    let done = pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn page_source::PageSink>, &pumping)?;
    sink.publish(&state)?;
    held.keep();
    Ok(Saved { stored: done.stored, zero: done.zero, state: length, took: begun.elapsed() })
}
