//! What a vCPU is like that was just created: what need not be put into it again. Each call that is left out is time that
//! a guest does not wait.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_debugregs, kvm_mp_state, kvm_vcpu_events, kvm_xcrs};
use kvm_ioctls::VmFd;

use super::Host;
use crate::sys;

/// The vCPUs were just created, and nothing was done to them or to their VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Created {
    /// How fast their time stamp counters run, if the VM tells.
    pub(super) tsc_khz: Option<u32>,
}

impl Created {
    pub(super) fn of(vm: &VmFd, host: &Host) -> Created {
        Created { tsc_khz: if host.has.vm_tsc { sys::get_vm_tsc_khz(vm) } else { None } }
    }
}

/// After reset (Intel SDM volume 3, table 10-1).
pub(super) const DEBUG: kvm_debugregs =
    kvm_debugregs { db: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400, flags: 0, reserved: [0; 9] };

/// The first vCPU needs no start-up message.
pub(super) const FIRST_RUNS: kvm_mp_state = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };

/// Nothing is pending or being delivered. (The flags only tell which of the fields count.)
pub(super) fn no_events(events: &kvm_vcpu_events) -> bool {
    *events == kvm_vcpu_events { flags: events.flags, ..kvm_vcpu_events::default() }
}

/// Of the extended state nothing but x87 is switched on.
pub(super) fn only_x87(xcrs: &kvm_xcrs) -> bool {
    matches!((xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value), (1, 0, 1))
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::state::msrs;

    #[test]
    fn kvm_makes_them_so() {
        testkit::require!(Kvm);
        let kvm = Kvm::new().unwrap();
        let host = Host::probe(&kvm).unwrap();
        for irqchip in [false, true] {
            let vm = kvm.create_vm().unwrap();
            if irqchip {
                vm.create_irq_chip().unwrap();
            }
            let vcpu = vm.create_vcpu(0).unwrap();
            assert_eq!(vcpu.get_debug_regs().unwrap(), DEBUG);
            assert!(only_x87(&vcpu.get_xcrs().unwrap()));
            if let Some(khz) = Created::of(&vm, &host).tsc_khz {
                assert_eq!(vcpu.get_tsc_khz().unwrap(), khz);
            }
            assert_eq!(vcpu.get_mp_state().unwrap(), FIRST_RUNS);
            assert!(no_events(&vcpu.get_vcpu_events().unwrap()));
            vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
            let unlisted: Vec<u32> = msrs::unlisted().collect();
            let there = msrs::get(&vcpu, 0, &unlisted).unwrap();
            assert!(there.len() > 100, "{there:x?}");
            let other: Vec<_> = there.iter().filter(|(index, value)| !host.creates_msr(*index, *value)).collect();
            assert!(other.is_empty(), "{other:x?}");
            let bank = there.iter().find(|(index, _)| *index == 0x404).unwrap();
            assert!(!host.creates_msr(0x404, !bank.1), "another value");
        }
    }
}
