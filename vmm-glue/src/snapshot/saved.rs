//! A snapshot file that was opened, read but for its memory, and found fit for this host.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::Kvm;
use mapped_ram::{OpenError, Options, Snapshot, Watch};
use page_files::MappedRam;
use page_source::{PageSource, PumpError, PumpOptions, SourceError, pump};
use page_units::PageCount;
use uffd_engine::StartError;

use super::blueprint;
use super::step::{Clock, Step};
#[cfg(feature = "vcpus")]
use crate::MachineError;
use crate::ram::{GuestRam, MemoryError, RamSink, RamSpec};
use crate::state::{Host, MachineState, StateError};

/// A snapshot that this host can continue: opened, read but for its memory, and checked. Nothing has been started.
#[derive(Debug)]
pub struct SavedVm {
    snapshot: Arc<Snapshot>,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) state: Arc<MachineState>,
    pub(super) memory: Vec<RamSpec>,
    /// What took how long until now.
    pub(super) steps: Vec<(Step, Duration)>,
}

/// Why a machine can't be restored. Nothing runs then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The file is no snapshot, or is damaged.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file can't be mapped or read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The device state is unusable here.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is not enough memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine does not start.
    #[error(transparent)]
    Engine(#[from] StartError),
    /// Loading all memory failed.
    #[error(transparent)]
    Pages(#[from] PumpError),
    /// The machine can't be made.
    #[cfg(feature = "vcpus")]
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU's thread can't be started.
    #[error("a vCPU's thread can't be started: {0}")]
    Threads(#[from] io::Error),
}

impl SavedVm {
    /// Opens a snapshot file, reads its device state, and refuses by name what this host can't continue.
    ///
    /// # Errors
    /// If the file is damaged, was not written by [`save`](crate::save()), or needs what this host lacks.
    pub fn open(path: impl AsRef<Path>, kvm: &Kvm, host: &Host) -> Result<SavedVm, RestoreError> {
        SavedVm::open_with_devices(path, kvm, host, |_, _| false)
    }

    /// The same, of a file that has device sections of the caller's `own` besides: told by name and instance, and found by
    /// [`Snapshot::device`] in [`snapshot`](SavedVm::snapshot).
    ///
    /// # Errors
    /// As [`open`](SavedVm::open): devices that are not the caller's own are refused by name.
    pub fn open_with_devices(
        path: impl AsRef<Path>,
        kvm: &Kvm,
        host: &Host,
        own: impl Fn(&str, u32) -> bool,
    ) -> Result<SavedVm, RestoreError> {
        SavedVm::open_watching(path, kvm, host, own, Watch::default())
    }

    /// The same, with what a change of the file is noticed by while it is in use.
    ///
    /// # Errors
    /// As [`open_with_devices`](SavedVm::open_with_devices).
    pub fn open_watching(
        path: impl AsRef<Path>,
        kvm: &Kvm,
        host: &Host,
        own: impl Fn(&str, u32) -> bool,
        watch: Watch,
    ) -> Result<SavedVm, RestoreError> {
        SavedVm::read(path.as_ref(), kvm, host, own, watch, |_| Ok(())).map(|(saved, ())| saved)
    }

    /// As soon as it is known what memory the guest has, `with_memory` is called.
    pub(super) fn read<T>(
        path: &Path,
        kvm: &Kvm,
        host: &Host,
        own: impl Fn(&str, u32) -> bool,
        watch: Watch,
        with_memory: impl FnOnce(&[RamSpec]) -> Result<T, RestoreError>,
    ) -> Result<(SavedVm, T), RestoreError> {
        let mut clock = Clock::going_on(&[]);
        let snapshot = Arc::new(Snapshot::open_with(path, &Options::default().with_watch(watch))?);
        clock.done(Step::Open);
        let memory = blueprint::load(&snapshot)?;
        clock.done(Step::State);
        let made = with_memory(&memory)?;
        clock.done(Step::Memory);
        let state = Arc::new(MachineState::load_with_devices(&snapshot, own)?);
        host.check(kvm, &state)?;
        clock.done(Step::State);
        let source = Arc::new(MappedRam::new(Arc::clone(&snapshot))?);
        clock.done(Step::Open);
        Ok((SavedVm { snapshot, source, state, memory, steps: clock.steps }, made))
    }

    /// Takes the pages from another source instead: the same content from elsewhere, or the same source wrapped.
    #[must_use]
    pub fn with_source(mut self, wrap: impl FnOnce(Arc<dyn PageSource>) -> Arc<dyn PageSource>) -> SavedVm {
        self.source = wrap(self.source);
        self
    }

    /// The file.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// The steps that were taken to open it, each with the time it took.
    #[must_use]
    pub fn steps(&self) -> &[(Step, Duration)] {
        &self.steps
    }

    /// The memory that the guest had, block by block.
    #[must_use]
    pub fn memory(&self) -> &[RamSpec] {
        &self.memory
    }

    /// The device state.
    #[must_use]
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// Where the pages come from.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn PageSource> {
        &self.source
    }

    /// Loads all memory, before anything runs, into memory of this crate or [adopted](GuestRam::adopt) that is zero and has
    /// the snapshot's blocks.
    ///
    /// # Errors
    /// If blocks are missing or of another length, or a page can't be read.
    pub fn load_all(&self, ram: &Arc<GuestRam>, threads: usize) -> Result<Loaded, RestoreError> {
        let sink = Arc::new(RamSink::new(Arc::clone(ram), self.source.layout())?);
        let done = pump(Arc::clone(&self.source), sink, &PumpOptions { threads, ..PumpOptions::default() })?;
        Ok(Loaded { stored: done.stored, zero: done.zero })
    }
}

/// What was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded {
    /// Pages with content.
    pub stored: PageCount,
    /// Zero pages.
    pub zero: PageCount,
}
