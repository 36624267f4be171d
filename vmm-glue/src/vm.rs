//! A running guest: its vCPUs, and the engine that still brings its memory.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mapped_ram::Identity;
use page_units::{GuestAddr, PageCount};
use uffd_engine::{Engine, EngineError};

use crate::snapshot::RestoreReport;
use crate::snapshot::{LiveError, LiveOptions, LiveSnapshot, snapshot_live, snapshot_live_loading};
use crate::snapshot::{SaveError, SaveOptions, Saved, save};
use crate::state::Host;
use crate::vcpu::VcpuError;
use crate::{StopError, Vcpus};

/// A guest that was restored.
///
/// # Dropping
/// The vCPUs are told to end, then what is missing of the memory is poisoned, so that none of them can wait for it any
/// more, and then all threads are joined.
#[derive(Debug)]
pub struct Vm {
    vcpus: Option<Vcpus>,
    engine: Option<Engine>,
    report: RestoreReport,
    /// The file that the memory comes from.
    file: Identity,
}

/// Why a guest can't go on.
#[derive(Debug)]
#[non_exhaustive]
pub struct VmError {
    /// What the vCPU met, if it was a vCPU that failed.
    pub vcpu: Option<Arc<VcpuError>>,
    /// What the engine met, if its memory could not be loaded.
    pub engine: Option<Box<EngineError>>,
    /// The guest-physical address of the memory in question, where it is known.
    pub guest: Option<GuestAddr>,
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.vcpu, &self.engine) {
            (Some(vcpu), Some(engine)) => write!(f, "{vcpu}, because {engine}")?,
            (Some(vcpu), None) => write!(f, "{vcpu}")?,
            (None, Some(engine)) => write!(f, "the guest's memory could not be loaded: {engine}")?,
            (None, None) => f.write_str("the guest can't go on")?,
        }
        match (self.guest, self.vcpu.as_deref()) {
            (Some(_), Some(VcpuError::PageFailed { guest: Some(_), .. })) | (None, _) => Ok(()),
            (Some(guest), _) => write!(f, " (guest-physical {guest})"),
        }
    }
}

impl std::error::Error for VmError {}

/// Why a guest did not stop, or can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmStopError {
    /// The guest can't go on.
    #[error(transparent)]
    Failed(Box<VmError>),
    /// vCPUs did not stop in time.
    #[error(transparent)]
    Stop(StopError),
}

impl Vm {
    pub(crate) fn new(vcpus: Vcpus, engine: Option<Engine>, report: RestoreReport, file: Identity) -> Vm {
        Vm { vcpus: Some(vcpus), engine, report, file }
    }

    /// The vCPUs: to stop them, let them run, and look at them.
    ///
    /// # Panics
    /// Never: they are there until the end.
    #[must_use]
    pub fn vcpus(&self) -> &Vcpus {
        self.vcpus.as_ref().unwrap_or_else(|| unreachable!("the vCPUs are there until the end"))
    }

    /// The engine, if the memory comes on demand. Complete or not, it stays until the end.
    #[must_use]
    pub fn engine(&self) -> Option<&Engine> {
        self.engine.as_ref()
    }

    /// How it was restored.
    #[must_use]
    pub fn report(&self) -> &RestoreReport {
        &self.report
    }

    /// Why the guest can't go on, if it can't.
    #[must_use]
    pub fn failure(&self) -> Option<VmError> {
        let vcpu = self.vcpus().failure();
        let engine = self.engine.as_ref().and_then(Engine::outcome).and_then(Result::err);
        if vcpu.is_none() && engine.is_none() {
            return None;
        }
        // A guest that has lost its page tables or its handlers of exceptions crashes; pages that failed are why.
        let crashed = matches!(vcpu.as_deref(), Some(VcpuError::Shutdown { .. } | VcpuError::Internal { .. }));
        let lost = || self.engine.as_ref().filter(|_| crashed).and_then(Engine::failed_pages);
        let engine = engine.or_else(lost);
        let of_vcpu = match vcpu.as_deref() {
            Some(VcpuError::PageFailed { guest, .. }) => *guest,
            _ => None,
        };
        let of_engine = || match &engine {
            Some(EngineError::Source { run, .. } | EngineError::Staging { run, .. }) => {
                self.report.place(self.vcpus().ram(), *run)
            }
            Some(EngineError::Install { at, .. }) => self.vcpus().ram().to_guest(*at),
            _ => None,
        };
        let guest = of_vcpu.or_else(of_engine);
        Some(VmError { vcpu, engine: engine.map(Box::new), guest })
    }

    /// Asks all vCPUs to stop, and waits until they have; see [`Vcpus::pause`].
    ///
    /// # Errors
    /// If they do not stop in time, or the guest can't go on.
    pub fn pause(&self, limit: Duration) -> Result<(), VmStopError> {
        self.vcpus().stop_handle().stop();
        self.wait_stopped(limit)
    }

    /// Waits until no vCPU runs any more: a device has stopped each, or the guest can't go on.
    ///
    /// # Errors
    /// If they do not stop in time, or the guest can't go on.
    pub fn wait_stopped(&self, limit: Duration) -> Result<(), VmStopError> {
        let stopped = self.vcpus().wait_stopped(limit);
        if let (Some(engine), Err(StopError::Failed(_))) = (&self.engine, &stopped) {
            // Its reason is the better one, and about to be known if it is not yet.
            engine.wait_for(Duration::from_millis(100));
        }
        match (self.failure(), stopped) {
            (Some(failure), _) => Err(VmStopError::Failed(Box::new(failure))),
            (None, Err(error)) => Err(VmStopError::Stop(error)),
            (None, Ok(())) => Ok(()),
        }
    }

    /// Lets all vCPUs run.
    pub fn resume(&self) {
        self.vcpus().resume();
    }

    /// Waits until all memory is there, for a limited time; `false` if it is not yet.
    ///
    /// # Errors
    /// If it could not be loaded.
    pub fn wait_complete(&self, limit: Duration) -> Result<bool, Box<VmError>> {
        let outcome = self.engine.as_ref().map(|engine| engine.wait_for(limit));
        match outcome {
            None | Some(Some(Ok(_))) => Ok(true),
            Some(None) => Ok(false),
            Some(Some(Err(error))) => {
                let unknown = VmError { vcpu: None, engine: Some(Box::new(error)), guest: None };
                Err(Box::new(self.failure().unwrap_or(unknown)))
            }
        }
    }

    /// Stops the vCPUs and saves everything; see [`save`](crate::save()).
    ///
    /// # Errors
    /// If memory is still missing, or anything fails.
    pub fn save(&self, host: &Host, path: &Path, options: &SaveOptions) -> Result<Saved, SaveError> {
        if let Some(pages) = self.poisoned() {
            return Err(SaveError::Poisoned(pages));
        }
        if self.engine.as_ref().is_some_and(|engine| !matches!(engine.outcome(), Some(Ok(_)))) {
            return Err(SaveError::Loading);
        }
        save(self.vcpus(), host, path, options)
    }

    fn is_loading(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| engine.outcome().is_none())
    }

    /// Whether this is the file that the memory comes from, under whatever name.
    fn is_loaded_from(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|of| Identity::from_metadata(&of).same_file(&self.file))
    }

    /// Pages that could not be loaded, and that the guest must not touch: they have no content to be saved.
    fn poisoned(&self) -> Option<PageCount> {
        let pages = self.engine.as_ref().map(|engine| PageCount(engine.stats().poisoned_pages));
        pages.filter(|pages| pages.0 > 0)
    }

    /// Takes a snapshot while the guest runs; see [`snapshot_live`](crate::snapshot_live()).
    ///
    /// The memory need not be complete: what is still missing is taken straight from the snapshot that it is loaded
    /// from, and is not brought into the memory for it. The engine goes on serving and loading, its own handlers serve
    /// the writers too, and it becomes complete only after the live snapshot has its pages. Dropping the guest meanwhile
    /// fails that snapshot.
    ///
    /// The file that memory is still being loaded from can't be the one that is written: replacing it would take away
    /// what is missing. When loading is [complete](Vm::wait_complete) it can.
    ///
    /// # Errors
    /// If anything fails: the guest goes on, and there is no file, or the one that was there before.
    pub fn snapshot_live(&self, host: &Host, path: &Path, options: &LiveOptions) -> Result<LiveSnapshot, LiveError> {
        if self.is_loading() && self.is_loaded_from(path) {
            return Err(LiveError::Source { path: path.into() });
        }
        match &self.engine {
            Some(engine) => snapshot_live_loading(self.vcpus(), engine, host, path, options),
            None => snapshot_live(self.vcpus(), host, path, options),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(vcpus) = &self.vcpus {
            vcpus.begin_end();
        }
        self.engine = None;
        self.vcpus = None;
    }
}
