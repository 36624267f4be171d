//! What this host's KVM can do, asked once.

use std::sync::{Arc, OnceLock};

use kvm_bindings::{CpuId, KVM_CAP_SREGS2, KVM_CAP_VM_TSC_CONTROL, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::error::Call;
use super::lack::{self, Lack};
use super::tsc::{self, TscMethod};
use super::{MachineState, StateError, VcpuState, cpuid, msrs};
use crate::sys;

/// The abilities of a host that matter for a guest's state. Cloning it is cheap.
#[derive(Clone, Debug)]
pub struct Host {
    pub(super) has: Arc<Abilities>,
}

#[derive(Debug)]
pub(super) struct Abilities {
    supported: CpuId,
    /// What a vCPU shows that was given just that: some hosts let guests see more.
    shown: OnceLock<CpuId>,
    /// In ascending order.
    pub(super) msrs: Vec<u32>,
    /// Those that KVM does not list, with what they are in a new vCPU. In ascending order.
    unlisted: Vec<(u32, u64)>,
    /// How fast the time stamp counter of a new vCPU runs, if KVM tells.
    tsc_khz: Option<u32>,
    pub(super) sregs2: bool,
    pub(super) tsc_control: bool,
    /// A VM tells how fast the counters of its vCPUs will run.
    pub(super) vm_tsc: bool,
    /// How a vCPU's time stamp counter is put back.
    pub(super) tsc: TscMethod,
    /// To ask what may have changed since.
    pub(super) kvm: Kvm,
    /// How many vCPUs a VM can have.
    max_vcpus: usize,
    /// What else a VM can have: interrupt controllers, timer, clock.
    irqchip: bool,
    pit: bool,
    clock: bool,
}

/// Whether a guest that has measured one frequency can go on with the other: within 250 ppm, what an NTP client corrects.
pub(super) fn close(wanted: u32, has: u32) -> bool {
    u64::from(wanted.abs_diff(has)) * 1_000_000 <= u64::from(wanted) * 250
}

impl Host {
    /// Asks KVM. It makes a vCPU for that, after which the process can't ask for more extended state: a VMM that wants AMX
    /// calls `arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM)` before (arch_prctl(2)).
    ///
    /// # Errors
    /// If it does not answer.
    pub fn probe(kvm: &Kvm) -> Result<Host, StateError> {
        let has = |cap: u32| kvm.check_extension_raw(cap.into());
        for (cap, name) in [
            (Cap::Xcrs, "KVM_CAP_XCRS"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(StateError::Unsupported(name.into()));
            }
        }
        let listed = kvm.get_msr_index_list().call("KVM_GET_MSR_INDEX_LIST", None)?;
        let vm = kvm.create_vm().call("KVM_CREATE_VM", None)?;
        let vcpu = vm.create_vcpu(0).call("KVM_CREATE_VCPU", None)?;
        let tsc_khz = vcpu.get_tsc_khz().ok();
        // Some MSRs are there only if CPUID says so.
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_SUPPORTED_CPUID", None)?;
        vcpu.set_cpuid2(&supported).call("KVM_SET_CPUID2", None)?;
        let mut unlisted = msrs::get(&vcpu, 0, &msrs::unlisted().collect::<Vec<_>>())?;
        unlisted.sort_unstable();
        let there = unlisted.iter().map(|&(index, _)| index);
        let mut msrs: Vec<u32> = listed.as_slice().iter().copied().chain(there).collect();
        msrs.sort_unstable();
        msrs.dedup();
        let has = Abilities {
            supported,
            shown: OnceLock::new(),
            msrs,
            unlisted,
            tsc_khz,
            sregs2: has(KVM_CAP_SREGS2) > 0,
            tsc_control: kvm.check_extension(Cap::TscControl),
            vm_tsc: has(KVM_CAP_VM_TSC_CONTROL) > 0,
            tsc: tsc::method(&vcpu)?,
            kvm: sys::same_kvm(kvm).call("duplicating the descriptor of KVM", None)?,
            max_vcpus: kvm.get_max_vcpus(),
            irqchip: kvm.check_extension(Cap::Irqchip),
            pit: kvm.check_extension(Cap::Pit2) && kvm.check_extension(Cap::PitState2),
            clock: kvm.check_extension(Cap::AdjustClock),
        };
        Ok(Host { has: Arc::new(has) })
    }

    /// How the time stamp counters of a guest that is restored here are put back.
    #[must_use]
    pub fn tsc_method(&self) -> TscMethod {
        self.has.tsc
    }

    /// Whether a vCPU that was just created has this value in an MSR that KVM does not list.
    pub(super) fn creates_msr(&self, index: u32, value: u64) -> bool {
        self.has.unlisted.binary_search(&(index, value)).is_ok()
    }

    fn shown(&self, kvm: &Kvm) -> Result<&CpuId, StateError> {
        if let Some(shown) = self.has.shown.get() {
            return Ok(shown);
        }
        let vm = kvm.create_vm().call("KVM_CREATE_VM", None)?;
        let vcpu = vm.create_vcpu(0).call("KVM_CREATE_VCPU", None)?;
        vcpu.set_cpuid2(&self.has.supported).call("KVM_SET_CPUID2", None)?;
        let shown = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_CPUID2", None)?;
        Ok(self.has.shown.get_or_init(|| shown))
    }

    /// Refuses, by name, what this host can't continue: before anything is started.
    ///
    /// # Errors
    /// [`StateError::Unsupported`] with everything that is missing.
    pub fn check(&self, kvm: &Kvm, state: &MachineState) -> Result<(), StateError> {
        let lacks = self.lacks(kvm, state)?;
        if lacks.is_empty() { Ok(()) } else { Err(StateError::Unsupported(lack::list(&lacks))) }
    }

    /// Lists everything that the state needs and this host does not have, sorted, each thing once.
    ///
    /// # Errors
    /// If KVM does not answer.
    pub fn lacks(&self, kvm: &Kvm, state: &MachineState) -> Result<Vec<Lack>, StateError> {
        let (wanted, has) = (&state.vm, &self.has);
        let sregs2 = |vcpu: &VcpuState| vcpu.sregs2.is_some_and(|sregs| sregs.flags != 0);
        let capabilities = [
            (wanted.interrupts.is_some() && !has.irqchip, "KVM_CAP_IRQCHIP", "interrupt controllers"),
            (wanted.pit.is_some() && !has.pit, "KVM_CAP_PIT_STATE2", "the 8254 timer"),
            (wanted.clock.is_some() && !has.clock, "KVM_CAP_ADJUST_CLOCK", "kvmclock"),
            (state.vcpus.iter().any(sregs2) && !has.sregs2, "KVM_CAP_SREGS2", "page directory pointers of PAE paging"),
        ];
        let lacking = capabilities.into_iter().filter(|(lacks, ..)| *lacks);
        let mut missing: Vec<Lack> = lacking.map(|(_, name, what)| Lack::Capability { name, what }).collect();
        if state.vcpus.len() > has.max_vcpus {
            missing.push(Lack::Vcpus { wanted: state.vcpus.len(), most: has.max_vcpus });
        }
        for vcpu in &state.vcpus {
            self.vcpu_lacks(kvm, vcpu, &mut missing)?;
        }
        missing.sort_unstable();
        missing.dedup();
        Ok(missing)
    }

    fn vcpu_lacks(&self, kvm: &Kvm, vcpu: &VcpuState, missing: &mut Vec<Lack>) -> Result<(), StateError> {
        let has = &self.has;
        let lacking = vcpu.extended_state() & !cpuid::extended_state(has.supported.as_slice());
        let bits = (0..u64::BITS).filter(|bit| lacking >> bit & 1 == 1);
        missing.extend(bits.map(|component| Lack::ExtendedState { component }));
        if !cpuid::missing(&vcpu.cpuid, has.supported.as_slice()).is_empty() {
            let both = [has.supported.as_slice(), self.shown(kvm)?.as_slice()].concat();
            missing.extend(cpuid::missing(&vcpu.cpuid, &both));
        }
        let words = vcpu.xsave.iter().rposition(|&word| word != 0).map_or(0, |last| last + 1);
        if words * 4 > sys::xsave_len(kvm).max(sys::XSAVE_WORDS * 4) {
            missing.push(Lack::ExtendedStateLength { bytes: vcpu.xsave.len() * 4 });
        }
        let unknown = vcpu.msrs.iter().filter(|(index, value)| {
            *value != 0 && !msrs::is_history(*index) && has.msrs.binary_search(index).is_err()
        });
        missing.extend(unknown.map(|&(index, _)| Lack::Msr { index }));
        if let (Some(wanted), Some(has_khz)) = (vcpu.tsc_khz, has.tsc_khz)
            && !(has.tsc_control || close(wanted, has_khz))
        {
            missing.push(Lack::TscFrequency { wanted, has: has_khz });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_pit_state2;

    use super::*;
    use crate::state::{Interrupts, VcpuState};

    /// What a host lacks, of a state that another one could have.
    #[test]
    fn each_thing_that_is_lacking_is_named() {
        testkit::require!(Kvm);
        let kvm = Kvm::new().unwrap();
        let mut state = MachineState::default();
        state.vm.interrupts =
            Some(Interrupts { pic_master: vec![0; 512], pic_slave: vec![0; 512], ioapic: vec![0; 512] });
        (state.vm.pit, state.vm.clock) = (Some(kvm_pit_state2::default()), Some(1));
        state.vcpus = vec![VcpuState::default(); 2];
        Host::probe(&kvm).unwrap().check(&kvm, &state).unwrap();
        let lacking = |without: &dyn Fn(&mut Abilities), state: &MachineState| {
            let mut host = Host::probe(&kvm).unwrap();
            without(Arc::get_mut(&mut host.has).unwrap());
            host.check(&kvm, state).unwrap_err().to_string()
        };
        for (without, what) in [
            (&(|has: &mut Abilities| has.irqchip = false) as &dyn Fn(&mut Abilities), "KVM_CAP_IRQCHIP"),
            (&|has: &mut Abilities| has.pit = false, "KVM_CAP_PIT_STATE2"),
            (&|has: &mut Abilities| has.clock = false, "KVM_CAP_ADJUST_CLOCK"),
            (&|has: &mut Abilities| has.max_vcpus = 1, "2 vCPUs (this host allows 1)"),
        ] {
            let error = lacking(without, &state);
            assert!(error.ends_with(what) || error.contains(&format!("{what} (")), "{error}");
            assert!(!error.contains(", "), "nothing else: {error}");
        }
        let mut newer = state.clone();
        newer.vcpus[1].xcrs.nr_xcrs = 1;
        newer.vcpus[1].xcrs.xcrs[0].value = 1 << 60;
        assert!(lacking(&|_| (), &newer).ends_with("component 60"));
        let mut newer = state.clone();
        newer.vcpus[0].xsave = vec![0; 1024];
        newer.vcpus[0].xsave[129] = 1 << 29;
        assert!(lacking(&|_| (), &newer).ends_with("component 61"));
    }
}
