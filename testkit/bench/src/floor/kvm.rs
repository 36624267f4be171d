//! The bare sequence that makes a guest run: a VM, memory slots, interrupt controllers, a vCPU, its state, KVM_RUN.

use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, Kvm, VcpuExit, VcpuFd, VmFd};
use testkit::guest::{GuestImage, layout};

use crate::sys;

/// All state of a VM with one vCPU, as KVM tells it.
pub struct State {
    cpuid: CpuId,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    regs: kvm_regs,
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("rip", &self.regs.rip).finish_non_exhaustive()
    }
}

/// A piece of guest memory: guest-physical start, address here, length.
pub type Slot = (u64, u64, u64);

/// The slots of a guest that the testkit made.
#[must_use]
pub fn slots<B: vm_memory::bitmap::Bitmap>(memory: &testkit::guest::Memory<B>) -> Vec<Slot> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    memory.iter().map(|region| (region.start_addr().0, region.as_ptr() as u64, region.len())).collect()
}

/// A VM with memory, interrupt controllers and one vCPU, in the order in which it is cheapest: slots first.
struct Vm {
    vm: VmFd,
    vcpu: VcpuFd,
}

fn create(kvm: &Kvm, slots: &[Slot]) -> Result<Vm, Error> {
    let vm = kvm.create_vm()?;
    for (slot, &(guest_phys_addr, userspace_addr, memory_size)) in (0..).zip(slots) {
        let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
        sys::set_slot(&vm, region)?;
    }
    vm.create_irq_chip()?;
    let vcpu = vm.create_vcpu(0)?;
    Ok(Vm { vm, vcpu })
}

/// Boots a guest whose programs are written, runs it to its first signal, and takes its state there.
///
/// # Errors
/// If KVM refuses, or the guest does something else.
///
/// # Panics
/// If KVM refuses to boot the vCPU.
pub fn boot_and_take(kvm: &Kvm, image: &GuestImage, slots: &[Slot]) -> Result<State, Error> {
    let mut vm = create(kvm, slots)?;
    image.boot_vcpu(kvm, &vm.vcpu, 0);
    run_to_signal(&mut vm.vcpu)?;
    // The port write is completed by the next KVM_RUN, and only then part of the state.
    vm.vcpu.set_kvm_immediate_exit(1);
    let completed = vm.vcpu.run().map(|exit| format!("{exit:?}"));
    assert_eq!(completed.map_err(|error| error.errno()), Err(libc::EINTR));
    vm.vcpu.set_kvm_immediate_exit(0);
    take(kvm, &vm)
}

fn run_to_signal(vcpu: &mut VcpuFd) -> Result<(), Error> {
    match vcpu.run()? {
        VcpuExit::IoOut(layout::PORT, [1 | 2]) => Ok(()),
        _ => Err(Error::new(libc::EPROTO)),
    }
}

fn take(kvm: &Kvm, vm: &Vm) -> Result<State, Error> {
    let vcpu = &vm.vcpu;
    let numbers = kvm.get_msr_index_list()?;
    let mut msrs = Vec::new();
    for &index in numbers.as_slice() {
        let mut one = msrs_of(&[kvm_msr_entry { index, ..kvm_msr_entry::default() }])?;
        if vcpu.get_msrs(&mut one)? == 1 {
            msrs.extend_from_slice(one.as_slice());
        }
    }
    // What can be read can't always be written; only what can is part of the sequence that is measured.
    msrs.retain(|&entry| msrs_of(&[entry]).and_then(|one| vcpu.set_msrs(&one)) == Ok(1));
    let chips = (0..3).map(|chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        vm.vm.get_irqchip(&mut chip).map(|()| chip)
    });
    Ok(State {
        cpuid: vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?,
        sregs: vcpu.get_sregs()?,
        xcrs: vcpu.get_xcrs()?,
        xsave: vcpu.get_xsave()?,
        debug: vcpu.get_debug_regs()?,
        lapic: vcpu.get_lapic()?,
        msrs,
        events: vcpu.get_vcpu_events()?,
        mp: vcpu.get_mp_state()?,
        regs: vcpu.get_regs()?,
        chips: chips.collect::<Result<_, _>>()?,
        clock: kvm_clock_data { clock: vm.vm.get_clock()?.clock, ..kvm_clock_data::default() },
    })
}

fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| Error::new(libc::E2BIG))
}

/// How long it takes to make a VM of that memory and state, and to run it to its next signal.
///
/// # Errors
/// If KVM refuses, or the guest does something else.
pub fn resume(kvm: &Kvm, state: &State, slots: &[Slot]) -> Result<Duration, Error> {
    let start = Instant::now();
    let mut vm = create(kvm, slots)?;
    for chip in &state.chips {
        vm.vm.set_irqchip(chip)?;
    }
    vm.vm.set_clock(&state.clock)?;
    let vcpu = &mut vm.vcpu;
    vcpu.set_cpuid2(&state.cpuid)?;
    vcpu.set_sregs(&state.sregs)?;
    vcpu.set_xcrs(&state.xcrs)?;
    sys::set_xsave(vcpu, &state.xsave)?;
    vcpu.set_debug_regs(&state.debug)?;
    vcpu.set_lapic(&state.lapic)?;
    if vcpu.set_msrs(&msrs_of(&state.msrs)?)? != state.msrs.len() {
        return Err(Error::new(libc::EPROTO));
    }
    vcpu.set_vcpu_events(&state.events)?;
    vcpu.set_mp_state(state.mp)?;
    vcpu.set_regs(&state.regs)?;
    run_to_signal(vcpu)?;
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use testkit::guest::{GuestConfig, Memory, Pattern, Privilege, Program};
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn the_sequence_brings_a_guest_back() {
        testkit::require!(Kvm);
        let memory: Memory = Memory::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
        let image = GuestImage::build(&memory, GuestConfig { privilege: Privilege::Kernel, vcpus: 1 });
        let program = Program { report_every: 1, pattern: Pattern::Random, ..Program::write_all(2 << 20) };
        image.write_program(&memory, 0, &program);
        let kvm = Kvm::new().unwrap();
        let state = boot_and_take(&kvm, &image, &slots(&memory)).unwrap();
        let before = image.report(&memory, 0);
        assert!(resume(&kvm, &state, &slots(&memory)).unwrap() > Duration::ZERO);
        let after = image.report(&memory, 0);
        assert_eq!((before.counter, after.counter), (1, 2));
    }
}
