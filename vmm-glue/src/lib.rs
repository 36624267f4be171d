//! Restores and saves KVM guests on top of `uffd-engine`, for VMMs on x86-64 that use `kvm-ioctls` and `vm-memory`.
//!
//! - [`GuestRam`]: RAM blocks, where the guest sees them (gaps included) and where they are mapped here.
//! - [`Machine`]: what saving asks of a VMM. Those that have no vCPU threads of their own take [`NewVm`], a VM made in the
//!   order that is fast and right, and [`Vcpus`], its threads, which can always be stopped (feature `vcpus`).
//! - [`MachineState`]: everything but memory, taken, checked against a [`Host`], encoded as device sections, put back.
//! - [`save()`] and [`SavedVm`]: into a snapshot file, and out of it, [eagerly](SavedVm::restore_eager) or
//!   [on demand](SavedVm::restore_on_demand): then the guest runs while its memory is still in the file.
//!   [`resume_on_demand`] does both steps at once, which is the fastest way to a running guest.
//! - [`snapshot_live`]: into a snapshot file while the guest runs; it stands still only for its device state and for
//!   the write-protection of its memory.
//!
//! A page whose content is unavailable is never zero and never MMIO: the guest stops with a [`VmError`] that names the
//! guest-physical address where it is known.
//!
//! The parts can be used one by one; `examples/restore.rs` shows them together.

mod live;
mod machine;
mod ram;
mod snapshot;
pub mod state;
mod sys;
#[cfg(feature = "vcpus")]
mod vcpu;
#[cfg(feature = "vcpus")]
mod vm;

pub use live::{Blackout, LiveError, LiveEvent, LiveOptions, LiveProgress, LiveReport, LiveSnapshot, snapshot_live};
pub use machine::{Held, Machine, StopError};
pub use ram::{Discard, GuestRam, Memory, MemoryError, OwnersBitmap, Piece, RamSource, RamSpec};
pub use snapshot::{Loaded, RestoreError, SaveError, SaveOptions, Saved, SavedVm, Step, host_check, save};
#[cfg(feature = "vcpus")]
pub use snapshot::{Mode, Observer, RestoreOptions, RestoreReport, resume_on_demand};
pub use state::{ClockPolicy, Host, Lack, MachineState, Restored, StateError, TscMethod, VcpuState, VmState};
pub use uffd_engine::{Backing, FreezeOptions, FreezeStats, Handlers};
#[cfg(feature = "vcpus")]
pub use vcpu::{Bus, FailedPage, MachineConfig, MachineError, NewVm, Next, StopHandle, VcpuError, VcpuOptions, Vcpus};
#[cfg(feature = "vcpus")]
pub use vm::{Vm, VmError, VmStopError};

/// The example in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
