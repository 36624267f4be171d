//! Making a machine on the thread that will run its first vCPU, while the caller sees to its memory.
//!
//! KVM's calls take most of the time of a restore. They need little of the snapshot, so they need not wait until all of
//! it is read; and they cost more when the vCPU moves to another core in between.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd};
use nix::sched::sched_getcpu;
use nix::unistd::{Pid, gettid};
use parking_lot::Mutex;

use super::group::Seats;
use super::run::{self, Place, Started};
use super::table::Wanted;
use crate::state::{ClockPolicy, Restored};
use crate::sys::VmWithRam;
use crate::{
    Bus, GuestRam, Host, MachineConfig, MachineError, MachineState, NewVm, RestoreError, StateError, VcpuOptions,
    Vcpus, sys,
};

/// How long the threads wait for each other without sleeping.
const SOON: Duration = Duration::from_micros(500);

/// A machine in the making. Dropping it ends that, and joins the thread.
pub(crate) struct Launch {
    /// Dropped before the thread is joined, which then gives up.
    orders: Option<SyncSender<Order>>,
    first: Option<Started<Made, RestoreError>>,
    seats: Seats,
    begun: Instant,
}

/// What the thread waits for, in this order.
enum Order {
    Memory(Arc<GuestRam>),
    Machine(Arc<MachineState>, ClockPolicy),
    Load,
    Run,
}

/// What the first vCPU's thread does before it runs the vCPU.
struct Work {
    kvm: Kvm,
    host: Host,
    caller: Option<Arc<Caller>>,
    orders: Receiver<Order>,
}

/// Who begins a restore on the core that is to be the vCPU's, and is to have another one, so that both get on.
struct Caller {
    thread: Pid,
    core: usize,
    moved: AtomicBool,
}

impl Caller {
    fn on(core: usize) -> Option<Arc<Caller>> {
        let here = sched_getcpu() == Ok(core);
        here.then(|| Arc::new(Caller { thread: gettid(), core, moved: AtomicBool::new(false) }))
    }

    /// Either the new thread begins at once, in front of the caller, or only when the caller lets it: whichever of the two
    /// gets on does it.
    fn move_off(&self) {
        if !self.moved.swap(true, Ordering::Relaxed) {
            sys::push_off(self.thread, self.core);
        }
    }
}

/// What it has made, and when.
struct Made {
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    vm: VmWithRam,
    config: MachineConfig,
    begun: Instant,
    machine: Duration,
    load: Duration,
    loaded: Instant,
    restored: Restored,
}

/// How long the parts took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    /// Creating VM, slots, chips and vCPUs.
    pub(crate) machine: Duration,
    /// Putting the state into them.
    pub(crate) load: Duration,
    /// What the threads cost: until the first begins, and from when it is about to run its vCPU.
    pub(crate) threads: Duration,
    /// How time goes on.
    pub(crate) restored: Restored,
}

impl Launch {
    /// Begins with what needs nothing: a thread on its core, and a VM.
    pub(crate) fn begin(
        kvm: &Kvm,
        host: &Host,
        bus: Arc<dyn Bus>,
        options: VcpuOptions,
    ) -> Result<Launch, RestoreError> {
        let begun = Instant::now();
        let (orders, to_do) = sync_channel(4);
        let caller = options.cores.first().and_then(|core| Caller::on(*core));
        let (kvm, host) = (sys::same_kvm(kvm)?, host.clone());
        let work = Work { kvm, host, caller: caller.clone(), orders: to_do };
        let seats = Seats::new(1, Wanted::Pause, bus, options);
        let first = run::spawn(seats.seat(0), move || work.run())?;
        if let Some(caller) = caller {
            caller.move_off();
        }
        Ok(Launch { orders: Some(orders), first: Some(first), seats, begun })
    }

    /// When it began.
    pub(crate) fn begun(&self) -> Instant {
        self.begun
    }

    /// The memory is mapped: gives it to the VM.
    pub(crate) fn memory(&self, ram: Arc<GuestRam>) {
        if let Some(orders) = &self.orders {
            // If the thread has ended, `finish` returns its error.
            let _ = orders.send(Order::Memory(ram));
        }
    }

    /// The state is known: makes the chips and vCPUs that it needs.
    pub(crate) fn machine(&self, state: Arc<MachineState>, clock: ClockPolicy) -> Result<(), RestoreError> {
        if state.vcpus.is_empty() {
            return Err(StateError::Invalid("the state of a machine without vCPUs".into()).into());
        }
        // Several begin together, when all are there.
        let alone = state.vcpus.len() == 1;
        let wanted = if alone && !self.seats.paused() { Wanted::Run } else { Wanted::Pause };
        self.seats.group.prepare(state.vcpus.len(), wanted);
        if let Some(orders) = &self.orders {
            let _ = orders.send(Order::Machine(state, clock));
        }
        Ok(())
    }

    /// To be called when the memory is being served, or all there: loads the state.
    pub(crate) fn load(&self) -> impl FnOnce() + Send + use<> {
        let orders = self.orders.clone();
        move || {
            if let Some(orders) = orders {
                let _ = orders.send(Order::Load);
            }
        }
    }

    /// The memory is sure to be served: lets the vCPUs run.
    pub(crate) fn finish(mut self) -> Result<(Vcpus, Times), RestoreError> {
        if let Some(orders) = self.orders.take() {
            let _ = orders.send(Order::Run);
        }
        let Some(first) = &self.first else { return Err(given_up()) };
        let made = receive(&first.ready).ok_or_else(ended)??;
        let Made { fds, vm, config, begun, machine, load, loaded, restored } = made;
        let mut vcpus = Vcpus::of(&self.seats, fds, config, vm);
        vcpus.start_others(&self.seats, self.first.take().map(|first| first.thread))?;
        let threads = begun.duration_since(self.begun) + loaded.elapsed();
        Ok((vcpus, Times { machine, load, threads, restored }))
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(first) = self.first.take()
            && first.thread.join().is_err()
        {
            log::error!("the thread that made a machine has panicked");
        }
    }
}

impl Work {
    fn run(self) -> Result<(Place, Made), RestoreError> {
        let begun = Instant::now();
        if let Some(caller) = self.caller {
            caller.move_off();
        }
        let vm = NewVm::empty(&self.kvm)?;
        let created = begun.elapsed();
        let Some(Order::Memory(ram)) = receive(&self.orders) else { return Err(given_up()) };
        let mapping = Instant::now();
        let vm = VmWithRam::new(vm, ram).map_err(MachineError::from)?;
        let mapped = mapping.elapsed();
        let Some(Order::Machine(state, clock)) = receive(&self.orders) else { return Err(given_up()) };
        let furnishing = Instant::now();
        // The last of these is dropped first.
        let NewVm { config, vm, vcpus } = NewVm::furnish(vm, MachineConfig::of(&state))?;
        let machine = created + mapped + furnishing.elapsed();
        let Some(Order::Load) = receive(&self.orders) else { return Err(given_up()) };
        let loading = Instant::now();
        let restored = state.restore_created(vm.vm(), &vcpus.iter().collect::<Vec<_>>(), &self.host, clock)?;
        let load = loading.elapsed();
        let fds: Vec<_> = vcpus.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        let fd = Arc::clone(fds.first().ok_or_else(given_up)?);
        let Some(Order::Run) = receive(&self.orders) else { return Err(given_up()) };
        let place = Place { fd, ram: Arc::clone(vm.ram()) };
        Ok((place, Made { fds, vm, config, begun, machine, load, loaded: Instant::now(), restored }))
    }
}

/// Waits for what the other of the two threads is about to send; `None` if it has ended. It spins for a moment before it
/// blocks: waking a sleeping core takes about as long as the wait itself, and costs the sender. `yield_now` lets other
/// threads have the core.
fn receive<T>(from: &Receiver<T>) -> Option<T> {
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        match from.try_recv() {
            Ok(sent) => return Some(sent),
            Err(TryRecvError::Empty) => std::thread::yield_now(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    from.recv().ok()
}

/// Never seen by a caller: the receiver has already been dropped.
fn given_up() -> RestoreError {
    RestoreError::Threads(io::Error::other("the restore was given up"))
}

fn ended() -> RestoreError {
    RestoreError::Threads(io::Error::other("the thread that makes the machine has panicked"))
}
