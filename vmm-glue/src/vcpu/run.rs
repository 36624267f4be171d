//! The thread of one vCPU.

use std::io;
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
use crate::sys::{self, Signals};

pub(super) struct ThreadContext {
    pub(super) vcpu: u32,
    pub(super) fd: Arc<Mutex<VcpuFd>>,
    pub(super) group: Arc<Group>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) bus: Arc<dyn Bus>,
    pub(super) kick_signal: i32,
    pub(super) core: Option<usize>,
}

/// The word of a thread that has its signals under control: it may be kicked from then on.
pub(super) type Ready = mpsc::Receiver<io::Result<()>>;

pub(super) struct Started {
    pub(super) thread: JoinHandle<()>,
    pub(super) ready: Ready,
}

/// Waits for it.
pub(super) fn is_ready(ready: &Ready) -> io::Result<()> {
    ready.recv().map_err(|_| io::Error::other("the thread of a vCPU ended before it began"))?
}

/// Starts the thread.
pub(super) fn spawn(context: ThreadContext) -> io::Result<Started> {
    let (tell, ready) = mpsc::channel();
    let thread = Builder::new().name(format!("vcpu{}", context.vcpu)).spawn(move || {
        let _known = Known(&context);
        let set_up = context.set_up();
        let go = set_up.is_ok();
        let told = tell.send(set_up);
        if go && told.is_ok() {
            context.serve();
        }
    })?;
    Ok(Started { thread, ready })
}

/// Takes the thread out of the table before it ends, however it does: nobody signals another one by mistake.
struct Known<'a>(&'a ThreadContext);

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

impl ThreadContext {
    fn signals(&self) -> [i32; 2] {
        [self.kick_signal, libc::SIGBUS]
    }

    fn set_up(&self) -> io::Result<()> {
        if let Some(core) = self.core {
            let mut set = CpuSet::new();
            set.set(core)?;
            sched_setaffinity(Pid::from_raw(0), &set)?;
        }
        let before = Signals::of(&self.signals()).block()?;
        sys::set_signal_mask(&self.fd.lock(), &before, &self.signals())?;
        self.group.table.lock()[self.index()].thread = Some(nix::unistd::gettid().as_raw());
        Ok(())
    }

    /// Runs and pauses as it is told, until the end.
    fn serve(&self) {
        while self.wait_for_work() {
            let result = self.run();
            let mut table = self.group.table.lock();
            let failed = result.is_err();
            let entry = &mut table[self.index()];
            entry.by_device = matches!(result, Ok(true));
            entry.phase = match result {
                Ok(_) => Phase::Paused,
                Err(error) => Phase::Failed(Arc::new(error)),
            };
            if entry.wanted == Wanted::Run {
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

    fn index(&self) -> usize {
        usize::try_from(self.vcpu).unwrap_or(usize::MAX)
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
        let mut fd = self.fd.lock();
        let mut by_device = false;
        while !self.to_stop() {
            match run_once(&mut fd, self.vcpu, &self.ram, &*self.bus) {
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
            match run_once(fd, self.vcpu, &self.ram, &*self.bus) {
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
                && let Outcome::Failed(error) = failed_page(self.vcpu, self.ram.to_guest(address), FailedPage::BusError)
            {
                result = Err(error);
            }
        }
        result
    }
}
