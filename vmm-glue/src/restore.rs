//! Restoring a machine from a snapshot file: eagerly, or on demand.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use kvm_ioctls::Kvm;
use mapped_ram::{OpenError, Snapshot};
use page_files::MappedRam;
use page_source::{PageSource, PumpError, PumpOptions, SourceError, pump};
use uffd_engine::{Backing, Builder, Engine, Event, Handlers, StartError};

use crate::memory::{GuestRam, MemoryError, RamSpec};
use crate::ram_sink::RamSink;
use crate::report::{Mode, RestoreReport, Step};
use crate::state::{ClockPolicy, Host, MachineState, StateError};
use crate::vcpu::Launch;
use crate::{Bus, MachineError, StopHandle, VcpuOptions, Vm, blueprint};

/// A snapshot that this host can continue: opened, read but for its memory, and checked. Nothing has been started.
#[derive(Debug)]
pub struct SavedVm {
    source: Arc<dyn PageSource>,
    /// Device and inode of the file.
    file: (u64, u64),
    state: Arc<MachineState>,
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
    Threads(#[from] io::Error),
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
    /// What time it is for the guest.
    pub clock: ClockPolicy,
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
        RestoreOptions {
            backing: Backing::Anonymous,
            vcpus: VcpuOptions::default(),
            eager_threads: 1,
            clock: ClockPolicy::GoOn,
            observer: None,
        }
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

    /// The guest's clocks go on where they stood, or catch up.
    #[must_use]
    pub fn with_clock(mut self, clock: ClockPolicy) -> RestoreOptions {
        self.clock = clock;
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
    last: Instant,
    steps: Vec<(Step, std::time::Duration)>,
}

impl Clock {
    fn going_on(steps: &[(Step, std::time::Duration)]) -> Clock {
        Clock { last: Instant::now(), steps: steps.to_vec() }
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
        SavedVm::read(path.as_ref(), kvm, host, |_| Ok(())).map(|(saved, ())| saved)
    }

    /// As soon as it is known what memory the guest has, `with_memory` is called.
    fn read<T>(
        path: &Path,
        kvm: &Kvm,
        host: &Host,
        with_memory: impl FnOnce(&[RamSpec]) -> Result<T, RestoreError>,
    ) -> Result<(SavedVm, T), RestoreError> {
        let mut clock = Clock::going_on(&[]);
        let snapshot = Arc::new(Snapshot::open(path)?);
        clock.done(Step::Open);
        let memory = blueprint::load(&snapshot)?;
        clock.done(Step::State);
        let made = with_memory(&memory)?;
        clock.done(Step::Memory);
        let state = Arc::new(MachineState::load(&snapshot)?);
        host.check(kvm, &state)?;
        clock.done(Step::State);
        let file = snapshot.identity().inode;
        let source = Arc::new(MappedRam::new(snapshot)?);
        clock.done(Step::Open);
        Ok((SavedVm { source, file, state, memory, steps: clock.steps }, made))
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
        let launch = Launch::begin(kvm, host, bus, options.vcpus.clone())?;
        let mut clock = Clock::going_on(&self.steps);
        let ram = memory(&launch, &self.memory, options)?;
        launch.machine(Arc::clone(&self.state), options.clock)?;
        let sink = Arc::new(RamSink::new(Arc::clone(&ram), self.source.layout())?);
        clock.done(Step::Memory);
        let load = launch.load();
        let pages = || {
            let pumping = PumpOptions { threads: options.eager_threads, ..PumpOptions::default() };
            let done = pump(Arc::clone(&self.source), sink, &pumping)?;
            load();
            Ok((Mode::Eager { stored: done.stored, zero: done.zero }, None))
        };
        self.start(launch, options, ram, pages, clock)
    }

    /// Starts an engine that brings memory when it is touched, and lets the guest run at once. `configure` sets up the
    /// engine: handlers, background, and so on, but not its observer: that is [`RestoreOptions::with_observer`]'s, since
    /// the vCPUs are stopped as soon as the engine fails. Nor `serving`, upon which the state is loaded.
    ///
    /// The engine serves before any device state is loaded, since that touches guest memory.
    ///
    /// Where vCPUs are bound to cores ([`VcpuOptions::cores`]) there is a handler on each of these at first, otherwise one
    /// that is not bound: measured, a fault that is served on its own core takes a tenth or less of one for which another
    /// core has to be woken (`cargo xtask bench fault`); `Handlers::measure` tries it on your machine.
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
        let launch = Launch::begin(kvm, host, bus, options.vcpus.clone())?;
        let mut clock = Clock::going_on(&self.steps);
        let ram = memory(&launch, &self.memory, options)?;
        clock.done(Step::Memory);
        self.on_demand(launch, ram, options, configure, clock)
    }

    fn on_demand(
        &self,
        launch: Launch,
        ram: Arc<GuestRam>,
        options: &RestoreOptions,
        configure: impl FnOnce(Builder) -> Builder,
        mut clock: Clock,
    ) -> Result<Vm, RestoreError> {
        launch.machine(Arc::clone(&self.state), options.clock)?;
        ram.check_untouched()?;
        let regions = ram.regions(self.source.layout())?;
        clock.done(Step::Memory);
        let builder = Engine::builder().regions(regions).source(Arc::clone(&self.source));
        let builder = builder.handlers(beside(&options.vcpus.cores));
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
        let builder = builder.serving(launch.load());
        let pages = || Ok((Mode::OnDemand, Some(builder.start()?)));
        let vm = self.start(launch, options, ram, pages, clock)?;
        let handle = stop.get_or_init(|| vm.vcpus().stop_handle());
        if matches!(vm.engine().and_then(Engine::outcome), Some(Err(_))) {
            // It failed before it knew whom to stop.
            handle.stop();
        }
        Ok(vm)
    }

    /// Lets `pages` see to the memory, while the machine is being made.
    fn start(
        &self,
        launch: Launch,
        options: &RestoreOptions,
        ram: Arc<GuestRam>,
        pages: impl FnOnce() -> Result<(Mode, Option<Engine>), RestoreError>,
        mut clock: Clock,
    ) -> Result<Vm, RestoreError> {
        // Should anything fail, the thread that makes the machine ends first, then the engine, and only then their
        // memory is unmapped.
        let _mapped = ram;
        let engine;
        let launch = launch;
        let (mode, started) = pages()?;
        engine = started;
        clock.done(Step::Pages);
        let begun = launch.begun();
        let (vcpus, times) = launch.finish()?;
        let mut steps = clock.steps;
        steps.extend([(Step::Machine, times.machine), (Step::Load, times.load), (Step::Threads, times.threads)]);
        let source = self.source.layout().clone();
        let report = RestoreReport {
            mode,
            backing: options.backing,
            took: begun.elapsed(),
            time: times.restored,
            steps,
            source,
        };
        Ok(Vm::new(vcpus, engine, report, self.file))
    }
}

/// Allocates the memory, and gives it to the VM that is being made.
fn memory(launch: &Launch, specs: &[RamSpec], options: &RestoreOptions) -> Result<Arc<GuestRam>, RestoreError> {
    let ram = Arc::new(GuestRam::allocate(specs, options.backing)?);
    launch.memory(Arc::clone(&ram));
    Ok(ram)
}

/// A handler on each of the cores that vCPUs are bound to.
fn beside(cores: &[usize]) -> Handlers {
    let mut cores = cores.to_vec();
    cores.sort_unstable();
    cores.dedup();
    Handlers::on_cores(cores)
}

/// Opens a snapshot and lets its guest run at once, its memory coming on demand: [`SavedVm::open`] and
/// [`SavedVm::restore_on_demand`] in one, and faster, since the VM is being made while the file is read.
///
/// With the first vCPU bound to a core ([`VcpuOptions::cores`]), the calling thread leaves that core to it.
///
/// # Errors
/// If anything fails: nothing runs then.
pub fn resume_on_demand(
    path: impl AsRef<Path>,
    kvm: &Kvm,
    host: &Host,
    bus: Arc<dyn Bus>,
    options: &RestoreOptions,
    configure: impl FnOnce(Builder) -> Builder,
) -> Result<Vm, RestoreError> {
    let launch = Launch::begin(kvm, host, bus, options.vcpus.clone())?;
    let (saved, ram) = SavedVm::read(path.as_ref(), kvm, host, |specs| memory(&launch, specs, options))?;
    let clock = Clock::going_on(&saved.steps);
    saved.on_demand(launch, ram, options, configure, clock)
}
