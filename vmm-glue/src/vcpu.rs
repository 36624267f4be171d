//! Threads that run vCPUs, and that can always be stopped.
//!
//! No signal handler is installed anywhere. In a vCPU's thread the kick signal and `SIGBUS` are blocked; only while
//! the thread is in `KVM_RUN` does `KVM_SET_SIGNAL_MASK` let them in, where they make the call return `EINTR` and stay
//! pending. The thread then takes them with `sigtimedwait`: a kick says that somebody wants the vCPU to stop, a
//! `SIGBUS` carries the address of a page whose content is unavailable.

mod bus;
mod exit;
mod group;
mod held;
mod launch;
mod new_vm;
mod run;
mod table;

pub use bus::{Bus, Next};
pub use exit::{FailedPage, VcpuError};
pub use group::{VcpuOptions, Vcpus};
pub(crate) use launch::Launch;
pub use new_vm::{MachineConfig, MachineError, NewVm};
pub use table::StopHandle;
