//! Model-specific registers.
//!
//! `KVM_GET_MSRS` and `KVM_SET_MSRS` stop at the first register that KVM refuses and return how many they did; what
//! comes after is silently left alone. So the count is checked, and a refused register is passed by only if it has the
//! wanted value already.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::StateError;
use super::error::Call;

/// `IA32_TSC`: written first, since the deadline depends on it.
pub(super) const TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`: written last, when the local APIC and the counter are right.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// `MSR_KVM_SYSTEM_TIME` and `MSR_KVM_SYSTEM_TIME_NEW`: where the guest's clock page is, and in bit 0 whether.
pub(super) const KVM_SYSTEM_TIME: u32 = 0x12;
pub(super) const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// What KVM keeps, but does not list (`KVM_GET_MSR_INDEX_LIST` of Linux 6.18): the memory type ranges (Intel SDM volume 3,
/// 13.11), and machine checks: capabilities, status, and 32 banks, as many as KVM knows, each with whether corrected
/// errors interrupt (volume 3, 17.3). Those that a vCPU does not have are passed by.
///
/// The capabilities can't be written: a guest that was given others than a new vCPU has (`KVM_X86_SETUP_MCE`) is refused.
pub(super) fn unlisted() -> impl Iterator<Item = u32> {
    let ranges = (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([0x2ff]);
    // Control, status, address and miscellany of each bank.
    ranges.chain([0x179, 0x17a]).chain(0x280..0x2a0).chain(0x400..0x480)
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries).map_err(|error| StateError::Invalid(format!("{} MSRs: {error:?}", entries.len())))
}

/// Reads as many of `indices` as there are.
pub(super) fn get(vcpu: &VcpuFd, number: u32, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entry = |&index: &u32| kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let mut msrs = list(&rest.iter().map(entry).collect::<Vec<_>>())?;
        let done = vcpu.get_msrs(&mut msrs).call("KVM_GET_MSRS", number)?.min(rest.len());
        found.extend(msrs.as_slice()[..done].iter().map(|entry| (entry.index, entry.data)));
        // The one at which KVM stopped does not exist on this vCPU.
        rest = &rest[(done + 1).min(rest.len())..];
    }
    Ok(found)
}

/// Writes all of them, in an order in which they take.
pub(super) fn set(vcpu: &VcpuFd, number: u32, values: impl Iterator<Item = (u32, u64)>) -> Result<(), StateError> {
    let mut ordered: Vec<(u32, u64)> = values.collect();
    ordered.sort_by_key(|&(index, _)| match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let entry = |&(index, data): &(u32, u64)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        let msrs = list(&rest.iter().map(entry).collect::<Vec<_>>())?;
        let done = vcpu.set_msrs(&msrs).call("KVM_SET_MSRS", number)?.min(rest.len());
        rest = &rest[done..];
        if let Some((&(index, value), others)) = rest.split_first() {
            let has = get(vcpu, number, &[index])?;
            // Writing 0 to what does not exist changes nothing.
            if has.first().map_or(0, |&(_, has)| has) != value {
                return Err(StateError::Msr { index, vcpu: number, value });
            }
            rest = others;
        }
    }
    Ok(())
}
