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

/// `MSR_KVM_ASYNC_PF_EN`: whether KVM tells the guest of pages that are not there yet, instead of waiting for them.
pub(super) const KVM_ASYNC_PF_EN: u32 = 0x4b56_4d02;
/// `IA32_DEBUGCTL`. Some KVMs answer that they have set it, and have not.
const DEBUGCTL: u32 = 0x1d9;

/// Which branches were taken last (Intel SDM volume 3, 19.13; AMD APM volume 2, 13.1.1.6), which most kernels tell and do
/// not take: history, which a debugger inside the guest loses. (The stack of branches of Intel's processors is not
/// read.)
pub(super) fn is_history(index: u32) -> bool {
    (0x1db..=0x1de).contains(&index)
}

/// What KVM keeps, but does not list (`KVM_GET_MSR_INDEX_LIST` of Linux 6.18, or of older kernels): the memory type ranges
/// (Intel SDM volume 3, 13.11); machine checks: capabilities, status, and 32 banks, as many as KVM knows, each with whether
/// corrected errors interrupt (volume 3, 17.3); `IA32_DEBUGCTL`; whose SGX enclaves may be launched; `TSC_AUX` where the
/// host's processor has no `RDTSCP`; and which errata the guest's system works around (AMD APM volume 2, appendix A: OSVW).
/// Those that a vCPU does not have are passed by.
///
/// The capabilities can't be written: a guest that was given others than a new vCPU has (`KVM_X86_SETUP_MCE`) is refused.
pub(super) fn unlisted() -> impl Iterator<Item = u32> {
    let ranges = (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([0x2ff]);
    // Control, status, address and miscellany of each bank.
    let checks = ranges.chain([0x179, 0x17a]).chain(0x280..0x2a0).chain(0x400..0x480);
    checks.chain([DEBUGCTL, 0xc000_0103, 0xc001_0140, 0xc001_0141]).chain(0x8c..=0x8f)
}

/// KVM takes fewer than 256 at once (`MAX_IO_MSRS` in arch/x86/kvm/x86.c): a processor with many performance counters has
/// more.
const AT_ONCE: usize = 255;

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, StateError> {
    Msrs::from_entries(entries).map_err(|error| StateError::Invalid(format!("{} MSRs: {error:?}", entries.len())))
}

/// Reads as many of `indices` as there are.
pub(super) fn get(vcpu: &VcpuFd, number: u32, indices: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entry = |&index: &u32| kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let now = &rest[..rest.len().min(AT_ONCE)];
        let mut msrs = list(&now.iter().map(entry).collect::<Vec<_>>())?;
        let done = vcpu.get_msrs(&mut msrs).call("KVM_GET_MSRS", number)?.min(now.len());
        found.extend(msrs.as_slice()[..done].iter().map(|entry| (entry.index, entry.data)));
        // The one at which KVM stopped does not exist on this vCPU.
        rest = &rest[(done + 1).min(now.len())..];
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
        let now = &rest[..rest.len().min(AT_ONCE)];
        let msrs = list(&now.iter().map(entry).collect::<Vec<_>>())?;
        let done = vcpu.set_msrs(&msrs).call("KVM_SET_MSRS", number)?.min(now.len());
        rest = &rest[done..];
        if let Some((&(index, value), others)) = rest.split_first().filter(|_| done < now.len()) {
            let has = get(vcpu, number, &[index])?;
            // Writing 0 to what does not exist changes nothing.
            if has.first().map_or(0, |&(_, has)| has) != value && !is_history(index) {
                return Err(StateError::Msr { index, vcpu: number, value });
            }
            rest = others;
        }
    }
    let debug = ordered.iter().rev().find(|(index, _)| *index == DEBUGCTL).map_or(0, |&(_, value)| value);
    if debug != 0 && get(vcpu, number, &[DEBUGCTL])?.first().is_none_or(|&(_, has)| has != debug) {
        return Err(StateError::Msr { index: DEBUGCTL, vcpu: number, value: debug });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::{Kvm, VmFd};

    use super::*;

    const SYSENTER_CS: u32 = 0x174;
    const PAT: u32 = 0x277;
    /// No vCPU has this one.
    const NONE: u32 = 0xdead_beef;

    fn vcpu() -> (VmFd, VcpuFd) {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        (vm, vcpu)
    }

    #[test]
    fn one_that_does_not_exist_is_passed_by() {
        testkit::require!(Kvm);
        let (_vm, vcpu) = vcpu();
        set(&vcpu, 0, [(SYSENTER_CS, 8), (NONE, 0), (PAT, 0x0007_0406)].into_iter()).unwrap();
        let found = get(&vcpu, 0, &[NONE, SYSENTER_CS, NONE, NONE, PAT, NONE]).unwrap();
        assert_eq!(found, [(SYSENTER_CS, 8), (PAT, 0x0007_0406)]);
        let error = set(&vcpu, 7, [(NONE, 5), (SYSENTER_CS, 16)].into_iter()).unwrap_err();
        assert!(matches!(error, StateError::Msr { index: NONE, vcpu: 7, value: 5 }), "{error}");
    }

    #[test]
    fn there_may_be_more_than_kvm_takes_at_once() {
        testkit::require!(Kvm);
        let (_vm, vcpu) = vcpu();
        for count in [255_usize, 256, 257, 1000] {
            let last = u64::try_from(count).unwrap();
            let values = (1..=last).map(|value| (SYSENTER_CS, value));
            set(&vcpu, 0, values.chain([(NONE, 0)])).unwrap();
            let mut indices = vec![SYSENTER_CS; count];
            indices.push(NONE);
            assert_eq!(get(&vcpu, 0, &indices).unwrap(), vec![(SYSENTER_CS, last); indices.len() - 1]);
        }
    }
}
