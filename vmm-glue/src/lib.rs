//! Restores, snapshots and resets KVM guests on top of `uffd-engine`. (Being written.)

mod machine;
mod memory;
pub mod state;
mod sys;
mod vcpu;

pub use machine::{Machine, MachineConfig, MachineError};
pub use memory::{GuestRam, Memory, MemoryError, Piece, RamSpec};
pub use state::{Host, MachineState, StateError, VcpuState, VmState};
pub use uffd_engine::Backing;
pub use vcpu::{Bus, FailedPage, Next, StopError, VcpuError, VcpuOptions, Vcpus};
