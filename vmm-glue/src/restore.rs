//! Restoring a machine from a snapshot file: eagerly, or on demand.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ioctls::Kvm;
use mapped_ram::{OpenError, Snapshot};
use page_source::{MappedRam, PageSource, PumpError, PumpOptions, SourceError, pump};
use uffd_engine::{Backing, Builder, Engine, Event, StartError};

use crate::memory::{GuestRam, MemoryError, RamSpec};
use crate::ram_sink::RamSink;
use crate::report::{Mode, RestoreReport, Step};
use crate::state::{Host, MachineState, StateError};
use crate::{Bus, Machine, MachineConfig, MachineError, StopHandle, VcpuOptions, Vcpus, Vm, blueprint};

/// A snapshot that this host can continue: opened, read but for its memory, and checked. Nothing has been started.
#[derive(Debug)]
pub struct SavedVm {
    source: Arc<dyn PageSource>,
    state: MachineState,
    memory: Vec<RamSpec>,
    steps: Vec<(Step, std::time::Duration)>,
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
    /// There is no memory to be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine does not start.
    #[error(transparent)]
    Engine(#[from] StartError),
    /// Loading all memory failed.
    #[error(transparent)]
    Pages(#[from] PumpError),
    /// The machine can't be made.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A vCPU's thread can't be started.
    #[error("a vCPU's thread can't be started: {0}")]
    Threads(#[source] io::Error),
}

/// What to make of a snapshot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// What guest memory is made of.
    pub backing: Backing,
    /// The vCPUs' threads.
    pub vcpus: VcpuOptions,
    /// How many threads load, when all is loaded before.
    pub eager_threads: usize,
    /// Told what the engine tells.
    pub observer: Option<Observer>,
}

/// Is told of an engine's events, on its supervising thread.
#[derive(Clone)]
pub struct Observer(Arc<dyn Fn(&Event) + Send + Sync>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

impl Default for RestoreOptions {
    /// Anonymous memory, running at once, one thread.
    fn default() -> RestoreOptions {
        RestoreOptions { backing: Backing::Anonymous, vcpus: VcpuOptions::default(), eager_threads: 1, observer: None }
    }
}

impl RestoreOptions {
    /// Memory of that kind.
    #[must_use]
    pub fn with_backing(mut self, backing: Backing) -> RestoreOptions {
        self.backing = backing;
        self
    }

    /// vCPU threads set up so.
    #[must_use]
    pub fn with_vcpus(mut self, vcpus: VcpuOptions) -> RestoreOptions {
        self.vcpus = vcpus;
        self
    }

    /// `observer` is told what the engine tells: first fault, completion, failure.
    #[must_use]
    pub fn with_observer(mut self, observer: impl Fn(&Event) + Send + Sync + 'static) -> RestoreOptions {
        self.observer = Some(Observer(Arc::new(observer)));
        self
    }

    /// The guest waits for [`Vm::resume`].
    #[must_use]
    pub fn paused(mut self) -> RestoreOptions {
        self.vcpus.paused = true;
        self
    }
}

/// Notes what each step takes.
struct Clock {
    begun: Instant,
    last: Instant,
    steps: Vec<(Step, std::time::Duration)>,
}

impl Clock {
    fn start(steps: &[(Step, std::time::Duration)]) -> Clock {
        let now = Instant::now();
        Clock { begun: now, last: now, steps: steps.to_vec() }
    }

    fn done(&mut self, step: Step) {
        let now = Instant::now();
        self.steps.push((step, now - self.last));
        self.last = now;
    }
}

impl SavedVm {
    /// Opens a snapshot file, reads its device state, and refuses by name what this host can't continue.
    ///
    /// # Errors
    /// If the file is damaged, was not written by [`save`](crate::save()), or needs what this host lacks.
    pub fn open(path: impl AsRef<Path>, kvm: &Kvm, host: &Host) -> Result<SavedVm, RestoreError> {
        let mut clock = Clock::start(&[]);
        let snapshot = Arc::new(Snapshot::open(path)?);
        let source = Arc::new(MappedRam::new(Arc::clone(&snapshot))?);
        clock.done(Step::Open);
        let state = MachineState::load(&snapshot)?;
        let memory = blueprint::load(&snapshot)?;
        host.check(kvm, &state)?;
        clock.done(Step::State);
        Ok(SavedVm { source, state, memory, steps: clock.steps })
    }

    /// Takes the pages from another source instead: the same content from elsewhere, or the same source wrapped.
    #[must_use]
    pub fn with_source(mut self, wrap: impl FnOnce(Arc<dyn PageSource>) -> Arc<dyn PageSource>) -> SavedVm {
        self.source = wrap(self.source);
        self
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

    /// Loads all memory, and then lets the guest run.
    ///
    /// # Errors
    /// If anything fails: nothing runs then.
    pub fn restore_eager(
        &self,
        kvm: &Kvm,
        host: &Host,
        bus: Arc<dyn Bus>,
        options: &RestoreOptions,
    ) -> Result<Vm, RestoreError> {
        let mut clock = Clock::start(&self.steps);
        let ram = Arc::new(GuestRam::allocate(&self.memory, options.backing)?);
        clock.done(Step::Memory);
        let sink = Arc::new(RamSink::new(Arc::clone(&ram), self.source.layout())?);
        let pumping = PumpOptions { threads: options.eager_threads, ..PumpOptions::default() };
        let done = pump(&*self.source, sink, &pumping)?;
        clock.done(Step::Pages);
        let mode = Mode::Eager { stored: done.stored, zero: done.zero };
        self.start(kvm, host, bus, options, ram, None, mode, clock)
    }

    /// Starts an engine that brings memory when it is touched, and lets the guest run at once. `configure` sets up the
    /// engine: handlers, background, and so on, but not its observer: that is [`RestoreOptions::with_observer`]'s, since
    /// the vCPUs are stopped as soon as the engine fails.
    ///
    /// The engine serves before any device state is loaded, since that touches guest memory.
    ///
    /// # Errors
    /// If anything fails: nothing runs then.
    pub fn restore_on_demand(
        &self,
        kvm: &Kvm,
        host: &Host,
        bus: Arc<dyn Bus>,
        options: &RestoreOptions,
        configure: impl FnOnce(Builder) -> Builder,
    ) -> Result<Vm, RestoreError> {
        let mut clock = Clock::start(&self.steps);
        let ram = Arc::new(GuestRam::allocate(&self.memory, options.backing)?);
        let regions = ram.regions(self.source.layout())?;
        clock.done(Step::Memory);
        let builder = Engine::builder().regions(regions).source(Arc::clone(&self.source));
        let stop = Arc::new(OnceLock::<StopHandle>::new());
        let (stopper, observer) = (Arc::clone(&stop), options.observer.clone());
        let builder = configure(builder).observer(move |event| {
            if let (Event::Failed(_), Some(stop)) = (event, stopper.get()) {
                stop.stop();
            }
            if let Some(Observer(observer)) = &observer {
                observer(event);
            }
        });
        let engine = builder.start()?;
        clock.done(Step::Pages);
        let vm = self.start(kvm, host, bus, options, ram, Some(engine), Mode::OnDemand, clock)?;
        let handle = stop.get_or_init(|| vm.vcpus().stop_handle());
        if matches!(vm.engine().and_then(Engine::outcome), Some(Err(_))) {
            // It failed before it knew whom to stop.
            handle.stop();
        }
        Ok(vm)
    }

    #[expect(clippy::too_many_arguments, reason = "the common end of two functions")]
    fn start(
        &self,
        kvm: &Kvm,
        host: &Host,
        bus: Arc<dyn Bus>,
        options: &RestoreOptions,
        ram: Arc<GuestRam>,
        engine: Option<Engine>,
        mode: Mode,
        mut clock: Clock,
    ) -> Result<Vm, RestoreError> {
        // Should anything fail, the engine ends before its memory is unmapped.
        let _mapped = Arc::clone(&ram);
        let engine = engine;
        let machine = Machine::new(kvm, ram, MachineConfig::of(&self.state))?;
        clock.done(Step::Machine);
        let vcpus: Vec<_> = machine.vcpus().iter().collect();
        self.state.restore(machine.vm(), &vcpus, host)?;
        clock.done(Step::Load);
        let vcpus = Vcpus::start(machine, bus, options.vcpus.clone()).map_err(RestoreError::Threads)?;
        clock.done(Step::Threads);
        let source = self.source.layout().clone();
        let report =
            RestoreReport { mode, backing: options.backing, took: clock.begun.elapsed(), steps: clock.steps, source };
        Ok(Vm::new(vcpus, engine, report))
    }
}
