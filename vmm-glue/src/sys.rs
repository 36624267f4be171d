//! What neither `kvm-ioctls` nor `nix` wraps.

mod kvm;
mod memory;
mod signals;
mod threads;

pub(crate) use kvm::*;
pub(crate) use memory::*;
pub(crate) use signals::Signals;
pub(crate) use threads::*;
