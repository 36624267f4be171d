//! The complete state of a KVM guest on x86-64, but for its memory: taken, checked against a host, and put back.

mod cpuid;
mod created;
mod decode;
mod encode;
mod error;
mod host;
mod msrs;
mod record;
mod vcpu;
mod vm;

pub(crate) use decode::check;
pub use error::StateError;
pub use host::Host;
pub use vcpu::VcpuState;
pub use vm::{Interrupts, VmState};

/// All of a guest's device state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MachineState {
    /// What belongs to no vCPU.
    pub vm: VmState,
    /// The vCPUs, in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
}
