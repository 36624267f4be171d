//! A vCPU: every register that KVM lets us see.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_REG_GUEST_SSP, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_regs, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_x86_reg_kvm, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::created::{self, Created};
use super::error::Call;
use super::host::close;
use super::tsc::Counters;
use super::{Host, StateError, cpuid, msrs};
use crate::sys;

/// The guest has switched on VMX (Intel SDM volume 3, 2.5).
const CR4_VMXE: u64 = 1 << 13;
/// The guest has switched on SVM (AMD APM volume 2, 3.1.7).
const EFER_SVME: u64 = 1 << 12;

/// The guest has switched on control-flow enforcement (Intel SDM volume 1, 17.1).
const CR4_CET: u64 = 1 << 23;
/// The shadow stack pointer, which is in no other structure (Linux 6.18, Documentation/virt/kvm/api.rst, 4.68).
const SSP: u64 = kvm_x86_reg_kvm(KVM_REG_GUEST_SSP);

/// What can't be saved of a guest.
fn not_saved(sregs: &kvm_sregs, events: &kvm_vcpu_events, cpuid: &[kvm_cpuid_entry2]) -> Option<String> {
    if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
        return Some("a guest that runs guests itself".into());
    }
    if let Some(name) = cpuid::other_hypervisor(cpuid) {
        return Some(format!("a guest that runs on {name}"));
    }
    (events.smi.smm != 0).then(|| "a guest in system management mode".into())
}

/// The shadow stack pointer of a vCPU that has one. KVM before Linux 6.18 does not tell it.
fn shadow_stack(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2], cr4: u64, id: u32) -> Result<Option<u64>, StateError> {
    if !cpuid::has_shadow_stacks(cpuid) {
        return Ok(None);
    }
    let mut bytes = [0; 8];
    match vcpu.get_one_reg(SSP, &mut bytes) {
        Ok(_) => Ok(Some(u64::from_le_bytes(bytes))),
        Err(_) if cr4 & CR4_CET == 0 => Ok(None),
        Err(error) => Err(StateError::Unsupported(format!(
            "saving a guest that uses shadow stacks (vCPU {id}): KVM does not tell the pointer ({error})"
        ))),
    }
}

/// The state of one vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct VcpuState {
    /// The vCPU's number.
    pub id: u32,
    /// What the guest believes of its processor.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The frequency of the time stamp counter in kHz, if KVM tells it.
    pub tsc_khz: Option<u32>,
    /// How far the guest's counter is ahead of the host's, if KVM tells it: keeps several vCPUs in step.
    pub tsc_offset: Option<u64>,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, and pending interrupt.
    pub sregs: kvm_sregs,
    /// The same with the pointers that PAE paging has loaded, if KVM tells them.
    pub sregs2: Option<kvm_sregs2>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// x87, vector and other extended state, in 4-byte words.
    pub xsave: Vec<u32>,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Exceptions and interrupts that are being delivered.
    pub events: kvm_vcpu_events,
    /// Running, halted, or waiting for a start-up message.
    pub mp_state: kvm_mp_state,
    /// Model-specific registers: number and value.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC, if it is in the kernel.
    pub lapic: Option<kvm_lapic_state>,
    /// The shadow stack pointer, if there is one and KVM tells it.
    pub ssp: Option<u64>,
}

impl VcpuState {
    /// Takes the state of a stopped vCPU. The last exit's work must be completed: run the vCPU once with
    /// `immediate_exit` set after an I/O exit, as the [`Vcpus`](crate::Vcpus) here do when they stop.
    ///
    /// # Errors
    /// If KVM refuses a call.
    pub fn save(vcpu: &VcpuFd, id: u32, host: &Host, irqchip: bool) -> Result<VcpuState, StateError> {
        // First of all, since it may deliver a start-up message, which changes registers.
        let mp_state = vcpu.get_mp_state().call("KVM_GET_MP_STATE", id)?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_CPUID2", id)?;
        let sregs = vcpu.get_sregs().call("KVM_GET_SREGS", id)?;
        let events = vcpu.get_vcpu_events().call("KVM_GET_VCPU_EVENTS", id)?;
        if let Some(what) = not_saved(&sregs, &events, cpuid.as_slice()) {
            return Err(StateError::Unsupported(format!("saving {what} (vCPU {id})")));
        }
        // Before the local APIC: a deadline that passes in between is then an interrupt in the APIC and not lost.
        let msrs = msrs::get(vcpu, id, &host.has.msrs)?;
        let lapic = if irqchip { Some(vcpu.get_lapic().call("KVM_GET_LAPIC", id)?) } else { None };
        let sregs2 = if host.has.sregs2 { Some(sys::get_sregs2(vcpu).call("KVM_GET_SREGS2", id)?) } else { None };
        Ok(VcpuState {
            id,
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().ok(),
            tsc_offset: sys::get_tsc_offset(vcpu).ok(),
            regs: vcpu.get_regs().call("KVM_GET_REGS", id)?,
            sregs,
            sregs2,
            xcrs: vcpu.get_xcrs().call("KVM_GET_XCRS", id)?,
            xsave: sys::get_xsave(&host.has.kvm, vcpu).call("KVM_GET_XSAVE", id)?,
            debug: vcpu.get_debug_regs().call("KVM_GET_DEBUGREGS", id)?,
            msrs,
            lapic,
            ssp: shadow_stack(vcpu, cpuid.as_slice(), sregs.cr4, id)?,
            events,
            mp_state,
        })
    }

    /// Puts the state into a fresh vCPU. What it may need of guest memory comes through the engine, which must be
    /// serving.
    ///
    /// The order matters (Linux Documentation/virt/kvm/api.rst and what KVM checks): CPUID decides which registers
    /// there are; the APIC's base is part of the special registers, so the APIC comes after them; the TSC deadline
    /// takes only when the APIC is in that mode; setting the general registers drops a pending exception, so the
    /// events come after them.
    ///
    /// # Errors
    /// If KVM refuses something: the vCPU is then useless.
    pub fn restore(&self, vcpu: &VcpuFd, host: &Host) -> Result<(), StateError> {
        self.put(vcpu, host, None, |state| Counters::new(host.has.tsc).put(vcpu, state, 0))
    }

    /// The same; what a vCPU that was just created has anyway is left out. `tsc` puts the time stamp counter back, or says
    /// what is to be written for that.
    pub(super) fn put(
        &self,
        vcpu: &VcpuFd,
        host: &Host,
        created: Option<Created>,
        tsc: impl FnOnce(&VcpuState) -> Result<Vec<(u32, u64)>, StateError>,
    ) -> Result<(), StateError> {
        let id = self.id;
        let fresh = created.is_some();
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|error| StateError::Invalid(format!("{} CPUID entries: {error:?}", self.cpuid.len())))?;
        vcpu.set_cpuid2(&cpuid).call("KVM_SET_CPUID2", id)?;
        self.restore_tsc_khz(vcpu, host, created)?;
        match &self.sregs2 {
            // Without valid pointers it says nothing that the older one does not.
            Some(sregs) if host.has.sregs2 && sregs.flags != 0 => {
                // The pending interrupt is not part of the newer structure.
                vcpu.set_sregs(&self.sregs).call("KVM_SET_SREGS", id)?;
                sys::set_sregs2(vcpu, sregs).call("KVM_SET_SREGS2", id)?;
            }
            _ => vcpu.set_sregs(&self.sregs).call("KVM_SET_SREGS", id)?,
        }
        if !(fresh && created::only_x87(&self.xcrs)) {
            vcpu.set_xcrs(&self.xcrs).call("KVM_SET_XCRS", id)?;
        }
        sys::set_xsave(&host.has.kvm, vcpu, &self.xsave).call("KVM_SET_XSAVE", id)?;
        if !(fresh && self.debug == created::DEBUG) {
            vcpu.set_debug_regs(&self.debug).call("KVM_SET_DEBUGREGS", id)?;
        }
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).call("KVM_SET_LAPIC", id)?;
        }
        let others = self.msrs.iter().copied().filter(|(index, _)| *index != msrs::TSC);
        let wanted = others.filter(|&(index, value)| !(fresh && host.creates_msr(index, value)));
        // What was to be told to the guest of pages that it waits for belongs to another time: off, and on again.
        let forgotten = self.msrs.iter().filter(|(index, _)| !fresh && *index == msrs::KVM_ASYNC_PF_EN);
        let forgotten = forgotten.map(|&(index, _)| (index, 0));
        msrs::set(vcpu, id, tsc(self)?.into_iter().chain(forgotten).chain(wanted))?;
        vcpu.set_regs(&self.regs).call("KVM_SET_REGS", id)?;
        if let Some(ssp) = self.ssp.filter(|&ssp| !(fresh && ssp == 0)) {
            vcpu.set_one_reg(SSP, &ssp.to_le_bytes()).call("KVM_SET_ONE_REG (shadow stack pointer)", id)?;
        }
        if !(fresh && created::no_events(&self.events)) {
            vcpu.set_vcpu_events(&self.events).call("KVM_SET_VCPU_EVENTS", id)?;
        }
        if !(fresh && id == 0 && self.mp_state == created::FIRST_RUNS) {
            vcpu.set_mp_state(self.mp_state).call("KVM_SET_MP_STATE", id)?;
        }
        // Tells a guest that uses kvmclock that it was stopped, so that it raises no lockup alarm; others have none.
        if self.has_kvmclock() {
            tell_stopped(vcpu);
        }
        Ok(())
    }

    /// Which parts of the extended state there are, as bits of XCR0: those that are switched on, and those that are not
    /// what they are after reset (`XSTATE_BV`, Intel SDM volume 1, 13.4.2).
    pub(super) fn extended_state(&self) -> u64 {
        let used = usize::try_from(self.xcrs.nr_xcrs).unwrap_or(usize::MAX).min(self.xcrs.xcrs.len());
        let on = self.xcrs.xcrs[..used].iter().filter(|xcr| xcr.xcr == 0).fold(0, |all, xcr| all | xcr.value);
        let [low, high] = [128, 129].map(|word| u64::from(self.xsave.get(word).copied().unwrap_or(0)));
        on | high << 32 | low
    }

    /// Whether the guest has switched on the clock page (Linux Documentation/virt/kvm/x86/msr.rst).
    fn has_kvmclock(&self) -> bool {
        [msrs::KVM_SYSTEM_TIME, msrs::KVM_SYSTEM_TIME_NEW].iter().any(|&index| self.msr(index).unwrap_or(0) & 1 == 1)
    }

    /// The guest must find its clock running at the speed it has measured.
    fn restore_tsc_khz(&self, vcpu: &VcpuFd, host: &Host, created: Option<Created>) -> Result<(), StateError> {
        let has = || created.and_then(|created| created.tsc_khz).or_else(|| vcpu.get_tsc_khz().ok());
        let Some(wanted) = self.tsc_khz else { return Ok(()) };
        let Some(has) = has() else { return Ok(()) };
        if close(wanted, has) {
            return Ok(());
        }
        if host.has.tsc_control && vcpu.set_tsc_khz(wanted).is_ok() {
            return Ok(());
        }
        // A refused call may have changed the value all the same.
        if vcpu.get_tsc_khz().is_ok_and(|now| now != has) {
            let put_back = vcpu.set_tsc_khz(has);
            log::debug!("the TSC frequency of vCPU {} put back to {has} kHz: {put_back:?}", self.id);
        }
        Err(StateError::Unsupported(format!("a TSC of {wanted} kHz (this host's runs at {has} kHz)")))
    }

    /// The value of a model-specific register.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|(found, _)| *found == index).map(|&(_, value)| value)
    }
}

/// Tells the guest of a vCPU that it was stopped, so that it does not take that for a lockup (`PVCLOCK_GUEST_STOPPED`):
/// to be called after each stop, before the vCPU runs again. `false` if the guest has no kvmclock. Linux
/// Documentation/virt/kvm/api.rst, 4.71.
pub fn tell_stopped(vcpu: &VcpuFd) -> bool {
    match vcpu.kvmclock_ctrl() {
        Ok(()) => true,
        // EINVAL: it has none.
        Err(error) => {
            if error.errno() != libc::EINVAL {
                log::debug!("the kvmclock of a vCPU can't be told that it was stopped: {error}");
            }
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_x86_reg_msr;
    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn what_can_not_be_saved_is_named() {
        let leaf = |name: &[u8; 12]| {
            let [ebx, ecx, edx] = [0, 4, 8].map(|at| u32::from_le_bytes(name[at..at + 4].try_into().unwrap()));
            [kvm_cpuid_entry2 { function: 0x4000_0000, ebx, ecx, edx, ..kvm_cpuid_entry2::default() }]
        };
        let (sregs, events) = (kvm_sregs::default(), kvm_vcpu_events::default());
        let kvm = leaf(b"KVMKVMKVM\0\0\0");
        assert_eq!(not_saved(&sregs, &events, &kvm), None);
        for nested in [kvm_sregs { cr4: CR4_VMXE, ..sregs }, kvm_sregs { efer: EFER_SVME, ..sregs }] {
            assert!(not_saved(&nested, &events, &kvm).unwrap().contains("runs guests itself"));
        }
        for (signature, name) in [(b"Microsoft Hv", "Hyper-V"), (b"XenVMMXenVMM", "Xen")] {
            assert!(not_saved(&sregs, &events, &leaf(signature)).unwrap().ends_with(name));
        }
        let mut managed = events;
        managed.smi.smm = 1;
        assert!(not_saved(&sregs, &managed, &kvm).unwrap().contains("system management"));
    }

    #[test]
    fn a_shadow_stack_that_kvm_does_not_tell_of_is_refused() {
        testkit::require!(Kvm);
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        // Without CPUID: it has none, and KVM says so.
        let vcpu = vm.create_vcpu(0).unwrap();
        let leaf = [kvm_cpuid_entry2 { function: 7, ecx: 1 << 7, ..kvm_cpuid_entry2::default() }];
        assert_eq!(shadow_stack(&vcpu, &[], CR4_CET, 0).unwrap(), None);
        assert_eq!(shadow_stack(&vcpu, &leaf, 0, 0).unwrap(), None);
        let error = shadow_stack(&vcpu, &leaf, CR4_CET, 3).unwrap_err().to_string();
        assert!(error.contains("shadow stacks (vCPU 3)"), "{error}");
        // The call is right where KVM has it: an MSR is read in the same way.
        let mut bytes = [0; 8];
        if vcpu.get_one_reg(kvm_x86_reg_msr(0x277), &mut bytes).is_ok() {
            let pat = msrs::get(&vcpu, 0, &[0x277]).unwrap();
            assert_eq!(pat, [(0x277, u64::from_le_bytes(bytes))]);
        }
    }
}
