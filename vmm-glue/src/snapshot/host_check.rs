//! What a snapshot needs of a host, without restoring it.

use kvm_ioctls::Kvm;
use mapped_ram::Snapshot;

use crate::state::{Host, Lack, MachineState, StateError};

/// Lists everything that a snapshot of ours needs and this host does not have: processor features, components of the
/// extended state, model-specific registers, the frequency of the counter, abilities of KVM. Empty if the guest can be
/// restored here. Devices that are the VMM's own are not looked at.
///
/// # Errors
/// If the file has no KVM state (one that QEMU wrote has none) or that is damaged, or this host has no usable KVM.
pub fn host_check(snapshot: &Snapshot) -> Result<Vec<Lack>, StateError> {
    let state = MachineState::load_with_devices(snapshot, |_, _| true)?;
    let kvm =
        Kvm::new().map_err(|error| StateError::Kvm { call: "opening /dev/kvm", vcpu: None, error: error.into() })?;
    Host::probe(&kvm)?.lacks(&kvm, &state)
}
