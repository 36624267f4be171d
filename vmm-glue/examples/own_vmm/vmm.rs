//! A small VMM. Of `vmm-glue` it uses the memory; what makes it one that can be saved is in `save.rs`.
#![expect(unsafe_code, reason = "signals, and memory that KVM knows by address")]

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use uffd_engine::Engine;
use vmm_glue::{GuestRam, StopError};

use super::vcpus::Shared;

/// Everything that can go wrong.
pub(crate) type Failed = Box<dyn Error>;
/// A VM.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    pub(crate) vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    pub(crate) vm: VmFd,
    // Last: what brings the memory, if that is still being loaded, and the memory.
    pub(crate) engine: Option<Engine>,
    pub(crate) ram: Arc<GuestRam>,
}

impl Vmm {
    /// Makes a VM of that memory. Its vCPUs wait; `prepare` puts something into them.
    pub(crate) fn new(
        kvm: &Kvm,
        ram: Arc<GuestRam>,
        engine: Option<Engine>,
        vcpus: u64,
        prepare: impl FnOnce(&VmFd, &[VcpuFd]) -> Result<(), Failed>,
    ) -> Result<Vmm, Failed> {
        let vm = kvm.create_vm()?;
        // SAFETY: the fields are dropped in their order: the memory last.
        unsafe { ram.set_slots(&vm) }?;
        vm.create_irq_chip()?;
        let fds = (0..vcpus).map(|id| vm.create_vcpu(id)).collect::<Result<Vec<_>, _>>()?;
        prepare(&vm, &fds)?;
        vmm_sys_util::signal::register_signal_handler(libc::SIGUSR1, interrupt)?;
        let vcpus = fds.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        let mut vmm = Vmm { shared: Arc::default(), threads: Vec::new(), vcpus, vm, engine, ram };
        for vcpu in &vmm.vcpus {
            let (vcpu, shared) = (Arc::clone(vcpu), Arc::clone(&vmm.shared));
            vmm.threads.push(std::thread::spawn(move || shared.serve(&vcpu)));
        }
        Ok(vmm)
    }

    /// Lets all vCPUs run.
    pub(crate) fn run(&self) {
        self.shared.change(|state| state.run = true);
    }

    /// Makes them stand still.
    pub(crate) fn stop(&self, limit: Duration) -> Result<(), StopError> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        state.run = false;
        self.shared.changed.notify_all();
        while state.running > 0 && Instant::now() < deadline {
            // Again and again: a signal that comes before KVM_RUN does not interrupt it.
            for thread in &self.threads {
                let _ = vmm_sys_util::signal::Killable::kill(thread, libc::SIGUSR1);
            }
            let moment = Duration::from_millis(1);
            state = self.shared.changed.wait_timeout(state, moment).unwrap_or_else(PoisonError::into_inner).0;
        }
        let late = || StopError::Other(format!("{} vCPUs have not stopped after {limit:?}", state.running).into());
        if state.running > 0 { Err(late()) } else { Ok(()) }
    }
}

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.shared.change(|state| state.end = true);
        let _ = self.stop(Duration::from_secs(60));
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}
