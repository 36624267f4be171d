//! All vCPUs of a machine: start, stop, resume, and what became of them.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};
use parking_lot::{Mutex, MutexGuard};

use super::run::{self, Place, Seat, Started};
use super::table::{Group, StopHandle, Wanted, failure, stopped};
use super::{Bus, VcpuError};
use crate::machine::FOR_EVER;
use crate::sys::VmWithRam;
use crate::{GuestRam, Host, MachineConfig, MachineState, NewVm, Restored, StateError, StopError};

/// How the threads are set up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VcpuOptions {
    /// The signal that interrupts a vCPU. Real-time signals are for applications to share out; nobody else in the
    /// process may send this one to the vCPUs' threads.
    pub kick_signal: i32,
    /// The core of each vCPU's thread; those without one run anywhere.
    pub cores: Vec<usize>,
    /// Whether they wait for [`Vcpus::resume`] before they run the first time.
    pub paused: bool,
}

impl Default for VcpuOptions {
    /// The last but one real-time signal, no fixed cores, running at once.
    fn default() -> VcpuOptions {
        VcpuOptions { kick_signal: libc::SIGRTMAX() - 1, cores: Vec::new(), paused: false }
    }
}

impl VcpuOptions {
    /// This signal interrupts a vCPU.
    #[must_use]
    pub fn with_kick_signal(mut self, signal: i32) -> VcpuOptions {
        self.kick_signal = signal;
        self
    }

    /// The threads are bound to these cores, in the order of the vCPUs' numbers.
    #[must_use]
    pub fn with_cores(mut self, cores: Vec<usize>) -> VcpuOptions {
        self.cores = cores;
        self
    }

    /// The vCPUs wait for [`Vcpus::resume`] before they run the first time.
    #[must_use]
    pub fn paused(mut self) -> VcpuOptions {
        self.paused = true;
        self
    }
}

/// The running machine: a VM, and a thread per vCPU. Dropping it stops and joins them; the engine that serves the
/// memory must live until then (or have been told to give up, which ends every wait).
pub struct Vcpus {
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Vec<JoinHandle<()>>,
    pub(super) group: Arc<Group>,
    options: VcpuOptions,
    config: MachineConfig,
    // Last: the vCPUs are dropped before it.
    vm: VmWithRam,
}

/// What the threads of a machine's vCPUs begin with.
pub(super) struct Seats {
    pub(super) group: Arc<Group>,
    bus: Arc<dyn Bus>,
    options: VcpuOptions,
}

impl Seats {
    /// For `vcpus` vCPUs.
    pub(super) fn new(vcpus: usize, wanted: Wanted, bus: Arc<dyn Bus>, options: VcpuOptions) -> Seats {
        Seats { group: Arc::new(Group::new(vcpus, wanted, options.kick_signal)), bus, options }
    }

    pub(super) fn seat(&self, vcpu: u32) -> Seat {
        Seat {
            vcpu,
            group: Arc::clone(&self.group),
            bus: Arc::clone(&self.bus),
            kick_signal: self.options.kick_signal,
            core: self.options.cores.get(usize::try_from(vcpu).unwrap_or(usize::MAX)).copied(),
        }
    }

    /// Whether the vCPUs wait for [`Vcpus::resume`].
    pub(super) fn paused(&self) -> bool {
        self.options.paused
    }
}

impl fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpus").field("config", &self.config).field("options", &self.options).finish_non_exhaustive()
    }
}

impl Vcpus {
    /// Starts a thread for each vCPU of `machine`.
    ///
    /// # Errors
    /// If a thread can't be made or set up.
    pub fn start(machine: NewVm, bus: Arc<dyn Bus>, options: VcpuOptions) -> io::Result<Vcpus> {
        let NewVm { vcpus, vm, config } = machine;
        let wanted = if options.paused { Wanted::Pause } else { Wanted::Run };
        let seats = Seats::new(vcpus.len(), wanted, bus, options);
        let fds = vcpus.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        let mut all = Vcpus::of(&seats, fds, config, vm);
        all.spawn(&seats)?;
        Ok(all)
    }

    /// Without threads.
    pub(super) fn of(seats: &Seats, fds: Vec<Arc<Mutex<VcpuFd>>>, config: MachineConfig, vm: VmWithRam) -> Vcpus {
        let (group, options) = (Arc::clone(&seats.group), seats.options.clone());
        Vcpus { fds, threads: Vec::new(), group, options, config, vm }
    }

    /// The first vCPU has its thread: starts those of the others. If there are any, the first has waited for them.
    pub(super) fn start_others(&mut self, seats: &Seats, first: Option<JoinHandle<()>>) -> io::Result<()> {
        self.threads.extend(first);
        if self.spawn(seats)? && !seats.paused() {
            self.resume();
        }
        Ok(())
    }

    /// Starts the threads that are missing, and says whether there were any.
    fn spawn(&mut self, seats: &Seats) -> io::Result<bool> {
        let mut started = Vec::new();
        for (fd, vcpu) in self.fds.iter().zip(0..).skip(self.threads.len()) {
            let place = Place { fd: Arc::clone(fd), ram: Arc::clone(self.ram()) };
            let Started { thread, ready } = run::spawn(seats.seat(vcpu), move || Ok::<_, io::Error>((place, ())))?;
            self.threads.push(thread);
            started.push(ready);
        }
        started.iter().try_for_each(run::wait)?;
        Ok(!started.is_empty())
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        self.vm.vm()
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// What the machine consists of.
    #[must_use]
    pub fn config(&self) -> MachineConfig {
        self.config
    }

    /// Asks all vCPUs to stop, and waits until they have.
    ///
    /// Nothing that serves page faults is held meanwhile. A vCPU that waits for a missing page inside the kernel
    /// can't be interrupted on every host, so there is a time limit; the request stands afterwards:
    /// [`wait_stopped`](Vcpus::wait_stopped) waits on, [`resume`](Vcpus::resume) takes it back.
    ///
    /// # Errors
    /// If they do not stop in time, or one of them has failed.
    pub fn pause(&self, limit: Duration) -> Result<(), StopError> {
        self.group.want(Wanted::Pause);
        self.wait_stopped(limit)
    }

    /// Waits until no vCPU runs any more, for whatever reason.
    ///
    /// # Errors
    /// If they do not stop in time, or one of them has failed.
    pub fn wait_stopped(&self, limit: Duration) -> Result<(), StopError> {
        let deadline = Instant::now() + limit.min(FOR_EVER);
        let mut table = self.group.table.lock();
        loop {
            if let Some(error) = failure(&table) {
                return Err(StopError::Failed(error));
            }
            let running: Vec<u32> =
                (0..).zip(table.iter()).filter(|(_, entry)| !stopped(entry)).map(|(vcpu, _)| vcpu).collect();
            if running.is_empty() {
                return Ok(());
            }
            if self.group.changed.wait_until(&mut table, deadline).timed_out() {
                return Err(StopError::Timeout { vcpus: running, limit });
            }
        }
    }

    /// Lets all stopped vCPUs run. One that has failed stays as it is.
    pub fn resume(&self) {
        self.group.want(Wanted::Run);
    }

    /// Why a vCPU can't go on, if one can't. The others were asked to stop then.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<VcpuError>> {
        failure(&self.group.table.lock())
    }

    /// A vCPU, to look at it or change it. Only while they are stopped: waits for its thread otherwise.
    ///
    /// # Panics
    /// If there is no vCPU of that number.
    pub fn vcpu(&self, number: u32) -> MutexGuard<'_, VcpuFd> {
        self.fds[usize::try_from(number).unwrap_or(usize::MAX)].lock()
    }

    /// The state of the stopped machine.
    ///
    /// # Errors
    /// If KVM refuses a call.
    pub fn save_state(&self, host: &Host) -> Result<MachineState, StateError> {
        let guards: Vec<_> = self.fds.iter().map(|fd| fd.lock()).collect();
        let vcpus: Vec<&VcpuFd> = guards.iter().map(|guard| &**guard).collect();
        MachineState::save(self.vm(), &vcpus, host, self.config.irqchip, self.config.pit)
    }

    /// Puts state into the stopped machine: a reset to where it was saved. Time goes on where it was.
    ///
    /// # Errors
    /// If the state is of another machine, or KVM refuses a call.
    pub fn restore_state(&self, state: &MachineState, host: &Host) -> Result<Restored, StateError> {
        let guards: Vec<_> = self.fds.iter().map(|fd| fd.lock()).collect();
        let vcpus: Vec<&VcpuFd> = guards.iter().map(|guard| &**guard).collect();
        state.restore(self.vm(), &vcpus, host)
    }

    /// Something to stop them with from elsewhere.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle::of(&self.group)
    }

    /// Tells all vCPUs to end, and does not wait.
    pub(crate) fn begin_end(&self) {
        self.group.want(Wanted::End);
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.group.want(Wanted::End);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU's thread has panicked");
            }
        }
    }
}
