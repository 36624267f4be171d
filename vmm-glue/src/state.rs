//! The complete state of a KVM guest on x86-64, but for its memory: taken, checked against a host, and put back.

mod clock;
mod cpuid;
mod created;
mod decode;
mod encode;
mod error;
mod host;
mod lack;
mod msrs;
mod record;
mod tsc;
mod vcpu;
mod vm;

pub use clock::ClockPolicy;
pub(crate) use decode::check;
pub use error::StateError;
pub use host::Host;
pub use lack::Lack;
pub use tsc::TscMethod;
pub use vcpu::{VcpuState, tell_stopped};
pub use vm::{Interrupts, Restored, VmState};

/// All of a guest's device state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MachineState {
    /// What belongs to no vCPU.
    pub vm: VmState,
    /// The vCPUs, in the order of their numbers.
    pub vcpus: Vec<VcpuState>,
}
