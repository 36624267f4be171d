//! What neither `kvm-ioctls` nor `nix` wraps.

mod kvm;
mod memory;
#[cfg(feature = "vcpus")]
mod run;
mod signals;
mod slots;
#[cfg(feature = "vcpus")]
mod threads;

pub(crate) use kvm::*;
pub(crate) use memory::*;
#[cfg(feature = "vcpus")]
pub(crate) use run::*;
#[cfg(feature = "vcpus")]
pub(crate) use signals::Signals;
pub(crate) use signals::WritesFail;
#[cfg(feature = "vcpus")]
pub(crate) use slots::VmWithRam;
#[cfg(feature = "vcpus")]
pub(crate) use threads::*;
