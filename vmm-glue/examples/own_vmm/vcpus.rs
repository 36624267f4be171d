//! vCPU threads, and the device that they write to.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_glue::state::tell_stopped;

/// A byte that switches the vCPU off that writes it.
const OFF: u8 = 2;

/// What the threads and their owner share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) changed: Condvar,
}

/// Who runs, and the device: a console, which keeps what was written.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) run: bool,
    pub(crate) end: bool,
    /// How many vCPUs are in `KVM_RUN`, or about to be.
    pub(crate) running: usize,
    /// How many were switched off since they began.
    pub(crate) off: usize,
    /// What was written.
    pub(crate) console: Vec<u8>,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` says something.
    pub(crate) fn wait<T>(&self, done: impl Fn(&mut State) -> Option<T>) -> T {
        let mut state = self.lock();
        loop {
            if let Some(done) = done(&mut state) {
                return done;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until a vCPU is to run, and counts it then; `false` at the end.
    fn begin(&self) -> bool {
        self.wait(|state| {
            state.running += usize::from(state.run && !state.end);
            (state.run || state.end).then_some(!state.end)
        })
    }

    /// The thread of a vCPU.
    pub(crate) fn serve(&self, vcpu: &Mutex<VcpuFd>) {
        while self.begin() {
            let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            tell_stopped(&vcpu);
            let mut off = false;
            while !off && self.lock().run {
                match vcpu.run() {
                    Ok(VcpuExit::IoOut(_, data)) => {
                        off = data.contains(&OFF);
                        self.change(|state| state.console.extend(data));
                    }
                    Ok(VcpuExit::Intr) => {}
                    Err(error) if error.errno() == libc::EINTR => {}
                    other => panic!("{other:?}"),
                }
            }
            // KVM completes the last access in the next KVM_RUN, which is to do nothing else.
            vcpu.set_kvm_immediate_exit(1);
            let _ = vcpu.run();
            vcpu.set_kvm_immediate_exit(0);
            drop(vcpu);
            self.change(|state| {
                state.running -= 1;
                state.off += usize::from(off);
            });
            if off {
                self.wait(|state| (!state.run || state.end).then_some(()));
            }
        }
    }
}
