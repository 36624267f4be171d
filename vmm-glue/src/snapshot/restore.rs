//! Restoring a machine from a snapshot file: eagerly, or on demand.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvm_ioctls::Kvm;
use uffd_engine::{Builder, Engine, Event, Handlers};

use super::step::Clock;
use super::{Loaded, Mode, Observer, RestoreError, RestoreOptions, RestoreReport, SavedVm, Step};
use crate::ram::{GuestRam, RamSpec};
use crate::state::Host;
use crate::vcpu::Launch;
use crate::{Bus, StopHandle, Vm};

impl SavedVm {
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
        clock.done(Step::Memory);
        let load = launch.load();
        let loading = Arc::clone(&ram);
        let pages = || {
            let Loaded { stored, zero } = self.load_all(&loading, options.eager_threads)?;
            load();
            Ok((Mode::Eager { stored, zero }, None))
        };
        self.start(launch, options, ram, pages, clock)
    }

    /// Starts an engine that brings memory when it is touched, and lets the guest run at once. `configure` sets up the
    /// engine: handlers, background, and so on, but not its observer: that is [`RestoreOptions::with_observer`]'s, since
    /// the vCPUs are stopped as soon as the engine fails. Nor `serving`, upon which the state is loaded.
    ///
    /// The engine serves before any device state is loaded, since that touches guest memory.
    ///
    /// Where vCPUs are bound to cores ([`VcpuOptions::cores`](crate::VcpuOptions::cores)) there is a handler on each of these at first, otherwise one
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
        let builder = builder.handlers(on_cores_of(&options.vcpus.cores));
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
            // It failed before the vCPUs could be stopped by it.
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
        Ok(Vm::new(vcpus, engine, report, *self.snapshot().identity()))
    }
}

/// Allocates the memory, and gives it to the VM that is being made.
fn memory(launch: &Launch, specs: &[RamSpec], options: &RestoreOptions) -> Result<Arc<GuestRam>, RestoreError> {
    let ram = Arc::new(GuestRam::allocate(specs, options.backing)?);
    launch.memory(Arc::clone(&ram));
    Ok(ram)
}

/// A handler on each of the cores that vCPUs are bound to.
fn on_cores_of(cores: &[usize]) -> Handlers {
    let mut cores = cores.to_vec();
    cores.sort_unstable();
    cores.dedup();
    Handlers::on_cores(cores)
}

/// Opens a snapshot and lets its guest run at once, its memory coming on demand: [`SavedVm::open`] and
/// [`SavedVm::restore_on_demand`] in one, and faster, since the VM is being made while the file is read.
///
/// With the first vCPU bound to a core ([`VcpuOptions::cores`](crate::VcpuOptions::cores)), the calling thread leaves that core to it.
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
    let (saved, ram) =
        SavedVm::read(path.as_ref(), kvm, host, |_, _| false, options.watch, |specs| memory(&launch, specs, options))?;
    let clock = Clock::going_on(&saved.steps);
    saved.on_demand(launch, ram, options, configure, clock)
}
