//! The thread of one vCPU.

use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::VcpuFd;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use parking_lot::Mutex;

use super::exit::{Outcome, failed_page, run_once};
use super::table::{Group, Phase, Wanted};
use super::{Bus, FailedPage, VcpuError};
use crate::GuestRam;
use crate::state::tell_stopped;
use crate::sys::{self, Signals};

/// What the thread of a vCPU has before there is a vCPU.
pub(super) struct Seat {
    pub(super) vcpu: u32,
    pub(super) group: Arc<Group>,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) kick_signal: i32,
    pub(super) core: Option<usize>,
}

/// What it has then.
pub(super) struct Place {
    pub(super) fd: Arc<Mutex<VcpuFd>>,
    pub(super) ram: Arc<GuestRam>,
}

/// A thread, and its word that it has its signals under control: it may be kicked from then on. With it comes what
/// else it has made.
pub(super) struct Started<T, E> {
    pub(super) thread: JoinHandle<()>,
    pub(super) ready: mpsc::Receiver<Result<T, E>>,
}

/// Waits for that word.
pub(super) fn wait<T, E: From<io::Error>>(ready: &mpsc::Receiver<Result<T, E>>) -> Result<T, E> {
    ready.recv().map_err(|_| io::Error::other("the thread of a vCPU ended before it began"))?
}

/// Starts the thread. First of all, and on its core, it gets its vCPU from `make`, with something for the
/// thread that waits until it is ready; if that fails, the thread ends.
pub(super) fn spawn<T, E>(
    seat: Seat,
    make: impl FnOnce() -> Result<(Place, T), E> + Send + 'static,
) -> io::Result<Started<T, E>>
where
    T: Send + 'static,
    E: From<io::Error> + Send + 'static,
{
    let (tell, ready) = mpsc::sync_channel(1);
    let core = seat.core;
    let thread = Builder::new().name(format!("vcpu{}", seat.vcpu)).spawn(move || {
        let _known = Known(&seat);
        let begun = || {
            // If it could not be moved there from outside, this says why.
            seat.bind()?;
            let (place, made) = make()?;
            let runner = Runner { seat: &seat, place };
            runner.take_control()?;
            Ok((runner, made))
        };
        match begun() {
            Ok((runner, made)) => {
                if tell.send(Ok(made)).is_ok() {
                    runner.serve();
                }
            }
            Err(error) => drop(tell.send(Err(error))),
        }
    })?;
    if let Some(core) = core {
        sys::move_to(&thread, core);
    }
    Ok(Started { thread, ready })
}

/// Takes the thread out of the table before it ends, however it ends: no other thread is signalled by mistake.
struct Known<'a>(&'a Seat);

impl Drop for Known<'_> {
    fn drop(&mut self) {
        let mut table = self.0.group.table.lock();
        let entry = &mut table[self.0.index()];
        entry.thread = None;
        if matches!(entry.phase, Phase::Running) {
            entry.phase = Phase::Failed(Arc::new(VcpuError::Panicked { vcpu: self.0.vcpu }));
        }
        self.0.group.changed.notify_all();
    }
}

impl Seat {
    fn bind(&self) -> io::Result<()> {
        let Some(core) = self.core else { return Ok(()) };
        let mut set = CpuSet::new();
        set.set(core)?;
        Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
    }

    fn index(&self) -> usize {
        usize::try_from(self.vcpu).unwrap_or(usize::MAX)
    }
}

/// A vCPU in its seat.
struct Runner<'a> {
    seat: &'a Seat,
    place: Place,
}

impl Deref for Runner<'_> {
    type Target = Seat;

    fn deref(&self) -> &Seat {
        self.seat
    }
}

impl Runner<'_> {
    fn signals(&self) -> [i32; 2] {
        [self.kick_signal, libc::SIGBUS]
    }

    fn take_control(&self) -> io::Result<()> {
        let before = Signals::of(&self.signals()).block()?;
        sys::set_signal_mask(&self.place.fd.lock(), &before, &self.signals())?;
        self.group.table.lock()[self.index()].thread = Some(nix::unistd::gettid().as_raw());
        Ok(())
    }

    /// Runs and pauses as it is told, until the end.
    fn serve(&self) {
        let mut ran = false;
        while self.wait_for_work() {
            if std::mem::replace(&mut ran, true) {
                // It stood still, for however long. (What was restored has told its guest.)
                tell_stopped(&self.place.fd.lock());
            }
            let result = self.run();
            let mut table = self.group.table.lock();
            let failed = result.is_err();
            let entry = &mut table[self.index()];
            entry.by_device = matches!(result, Ok(true));
            entry.phase = match result {
                Ok(_) => Phase::Paused,
                Err(error) => Phase::Failed(Arc::new(error)),
            };
            // One that was only asked to stop, and whose stop was taken back meanwhile, goes on.
            if entry.wanted == Wanted::Run && (entry.by_device || failed) {
                entry.wanted = Wanted::Pause;
            }
            if failed {
                // The guest is broken: the others stop as well.
                for entry in table.iter_mut().filter(|entry| entry.wanted == Wanted::Run) {
                    entry.wanted = Wanted::Pause;
                }
                self.group.attention.store(true, Ordering::SeqCst);
                self.group.kick(&table);
            }
            self.group.changed.notify_all();
        }
    }

    /// Waits until this vCPU is to run, and says so in the table; `false` at the end.
    fn wait_for_work(&self) -> bool {
        let mut table = self.group.table.lock();
        loop {
            let entry = &mut table[self.index()];
            match (entry.wanted, &entry.phase) {
                (Wanted::End, _) => return false,
                (Wanted::Run, Phase::Paused) => {
                    entry.phase = Phase::Running;
                    return true;
                }
                (Wanted::Run | Wanted::Pause, _) => self.group.changed.wait(&mut table),
            }
        }
    }

    fn to_stop(&self) -> bool {
        self.group.attention.load(Ordering::SeqCst) && self.group.table.lock()[self.index()].wanted != Wanted::Run
    }

    /// Runs the vCPU until it is to stop; says whether a device has stopped it. What its last exit asked for is
    /// completed then.
    fn run(&self) -> Result<bool, VcpuError> {
        let mut fd = self.place.fd.lock();
        let mut by_device = false;
        while !self.to_stop() {
            match run_once(&mut fd, self.vcpu, &self.place.ram, &*self.bus) {
                Outcome::Run => {}
                Outcome::Interrupted => self.take_signals()?,
                Outcome::Stop | Outcome::Halted => {
                    by_device = true;
                    break;
                }
                Outcome::Failed(error) => return Err(error),
            }
        }
        Ok(self.complete(&mut fd)? || by_device)
    }

    /// An access that the devices have answered takes effect in the next `KVM_RUN`, which must not go any further.
    /// An instruction that makes several accesses asks for the next one instead, which is answered as well. Says
    /// whether a device stopped the vCPU with that.
    fn complete(&self, fd: &mut VcpuFd) -> Result<bool, VcpuError> {
        fd.set_kvm_immediate_exit(1);
        let mut by_device = false;
        let result = loop {
            match run_once(fd, self.vcpu, &self.place.ram, &*self.bus) {
                Outcome::Interrupted => break self.take_signals().map(|()| by_device),
                Outcome::Halted => break Ok(true),
                Outcome::Run => {}
                Outcome::Stop => by_device = true,
                Outcome::Failed(error) => break Err(error),
            }
        };
        fd.set_kvm_immediate_exit(0);
        result
    }

    fn take_signals(&self) -> Result<(), VcpuError> {
        let pending = Signals::of(&self.signals());
        let mut result = Ok(());
        while let Some((signal, address)) = pending.take() {
            if signal == libc::SIGBUS
                && let Outcome::Failed(error) =
                    failed_page(self.vcpu, self.place.ram.to_guest(address), FailedPage::BusError)
            {
                result = Err(error);
            }
        }
        result
    }
}
