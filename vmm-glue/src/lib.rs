//! Restores, snapshots and resets KVM guests on top of `uffd-engine`. (Being written.)

mod blueprint;
mod machine;
mod memory;
mod populated;
mod ram_sink;
mod ram_source;
mod report;
mod restore;
mod save;
pub mod state;
mod sys;
mod vcpu;
mod vm;

pub use machine::{Machine, MachineConfig, MachineError};
pub use memory::{GuestRam, Memory, MemoryError, Piece, RamSpec};
pub use ram_source::RamSource;
pub use report::{Mode, RestoreReport, Step};
pub use restore::{Observer, RestoreError, RestoreOptions, SavedVm};
pub use save::{SaveError, SaveOptions, Saved, save};
pub use state::{Host, MachineState, StateError, VcpuState, VmState};
pub use uffd_engine::Backing;
pub use vcpu::{Bus, FailedPage, Next, StopError, StopHandle, VcpuError, VcpuOptions, Vcpus};
pub use vm::{Vm, VmError, VmStopError};
