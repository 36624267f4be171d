//! Saves and restores KVM guests on x86-64, for VMMs that use `kvm-ioctls` and `vm-memory`: a guest runs again while its
//! memory is still in the file, and is saved while it runs.
//!
//! ```no_run
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use vmm_glue::{Bus, Host, LiveOptions, Next, RestoreOptions, SavedVm};
//!
//! struct Devices;
//! impl Bus for Devices {
//!     fn io_out(&self, _vcpu: u32, _port: u16, _data: &[u8]) -> Next {
//!         Next::Run
//!     }
//! }
//!
//! let kvm = kvm_ioctls::Kvm::new()?;
//! // Once per process: what this host can do.
//! let host = Host::probe(&kvm)?;
//!
//! // Reads metadata and device state, and refuses by name what this host can't continue.
//! let saved = SavedVm::open("guest.mr", &kvm, &host)?;
//! // The guest runs when this returns, and its memory comes when it is touched.
//! let vm = saved.restore_on_demand(&kvm, &host, Arc::new(Devices), &RestoreOptions::default(), |engine| engine)?;
//!
//! // It stands still for a moment, and its file is written while it goes on.
//! let report = vm.snapshot_live(&host, "again.mr".as_ref(), &LiveOptions::default())?.wait()?;
//! println!("stood still for {:?}", report.blackout.total);
//! while !vm.wait_complete(Duration::from_secs(1))? {}
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`GuestRam`]: RAM blocks, where the guest sees them (gaps included) and where they are mapped here; allocated, or
//!   adopted from a VMM.
//! - [`MachineState`]: everything but memory, taken, checked against a [`Host`], encoded as device sections, put back.
//! - [`Machine`]: what saving asks of a VMM that has vCPU threads of its own. (Others take [`NewVm`], a VM made in the order
//!   that is fast and right, and [`Vcpus`], its threads, which can always be stopped: feature `vcpus`.)
//! - [`save()`] and [`SavedVm`]: into a snapshot file, and out of it, [eagerly](SavedVm::restore_eager) or
//!   [on demand](SavedVm::restore_on_demand). [`resume_on_demand`] opens and restores at once, which is the fastest way to a
//!   running guest.
//! - [`snapshot_live`]: into a snapshot file while the guest runs; it stands still only for its device state and for the
//!   write-protection of its memory.
//!
//! A page whose content is unavailable is never zero and never MMIO: the guest stops with a [`VmError`] that names the
//! guest-physical address where it is known.
//!
//! The parts can be used one by one: `examples/own_vmm` is a VMM of its own that is saved and restored with them.

mod machine;
mod ram;
mod snapshot;
pub mod state;
mod sys;
#[cfg(feature = "vcpus")]
mod vcpu;
#[cfg(feature = "vcpus")]
mod vm;

pub use machine::{Held, Machine, StopError};
pub use ram::{Discard, GuestRam, Memory, MemoryError, OwnersBitmap, Piece, RamSource, RamSpec};
pub use snapshot::{
    Blackout, LiveError, LiveEvent, LiveOptions, LiveProgress, LiveReport, LiveSnapshot, Loaded, RestoreError,
    SaveError, SaveOptions, Saved, SavedVm, Step, host_check, save, snapshot_live, snapshot_live_loading,
};
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
