//! The micro guest under bare KVM does what the oracle says, at both privilege levels, on one and two vCPUs.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use testkit::guest::{
    GuestConfig, GuestImage, Memory, Operation, Oracle, Pattern, Privilege, Program, Signal, Walker, fill_pages, layout,
};
use testkit::require;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// 6 MiB low, 8 MiB above 4 GiB, with a gap between.
fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), 6 << 20), (GuestAddress(1 << 32), 8 << 20)]).unwrap()
}

fn machine(kvm: &Kvm, memory: &Memory, image: &GuestImage) -> (VmFd, Vec<VcpuFd>) {
    let vm = kvm.create_vm().unwrap();
    for (slot, region) in (0..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
        };
        add_slot(&vm, slot);
    }
    let vcpus = (0..image.config().vcpus).map(|number| {
        let vcpu = vm.create_vcpu(u64::from(number)).unwrap();
        image.boot_vcpu(kvm, &vcpu, number);
        vcpu
    });
    let vcpus = vcpus.collect();
    (vm, vcpus)
}

#[expect(unsafe_code, reason = "KVM is given the address of memory that outlives the VM")]
fn add_slot(vm: &VmFd, slot: kvm_userspace_memory_region) {
    // SAFETY: the slot is a region of the memory of the test, which is dropped after the VM.
    unsafe { vm.set_user_memory_region(slot) }.unwrap();
}

fn next_signal(vcpu: &mut VcpuFd) -> Signal {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(layout::PORT, data) => Signal::of(data[0]),
        other => panic!("{other:?}"),
    }
}

fn programs(image: &GuestImage) -> Vec<Program> {
    let pages = image.window_len() >> 12;
    let base = Program { report_every: 700, ..Program::write_all(image.window_len()) };
    vec![
        base,
        Program { operation: Operation::Read, pattern: Pattern::Stride(77), seed: 5, ..base },
        Program { operation: Operation::Add, pattern: Pattern::Random, steps: pages * 3 / 2, seed: 1 << 60, ..base },
        Program { operation: Operation::Write { words: 512 }, pattern: Pattern::Random, steps: 900, seed: 12, ..base },
        Program { unit_shift: 3, units: 5000, start: 4096 * 3 + 8, steps: 5000, pattern: Pattern::Stride(3), ..base },
    ]
}

fn runs_as_the_oracle_says(privilege: Privilege) {
    let kvm = Kvm::new().unwrap();
    let memory = memory();
    let image = GuestImage::build(&memory, GuestConfig { privilege, vcpus: 1 });
    fill_pages(&memory, &image, 30, 42);
    let (_vm, mut vcpus) = machine(&kvm, &memory, &image);
    for program in programs(&image) {
        image.write_program(&memory, 0, &program);
        let mut oracle = Oracle::capture(&image, &memory);
        let mut walker = Walker::new(program);
        loop {
            match next_signal(&mut vcpus[0]) {
                Signal::Progress => {
                    let counter = walker.counter() + program.report_every;
                    oracle.advance(0, &mut walker, counter);
                    assert_eq!(image.report(&memory, 0).counter, counter, "{program:?}");
                }
                Signal::Done => break,
                other => panic!("{other:?} {:?}", image.report(&memory, 0)),
            }
        }
        oracle.advance(0, &mut walker, u64::MAX);
        let report = image.report(&memory, 0);
        assert_eq!((report.counter, report.checksum), (program.steps, walker.checksum()), "{program:?}");
        oracle.compare(&memory).unwrap();
        assert!(report.stamps[..2].is_sorted() && report.stamps[0] != 0, "{report:?}");
    }
}

#[test]
fn runs_as_the_oracle_says_at_cpl_0() {
    require!(Kvm);
    runs_as_the_oracle_says(Privilege::Kernel);
}

#[test]
fn runs_as_the_oracle_says_at_cpl_3() {
    require!(Kvm);
    runs_as_the_oracle_says(Privilege::User);
}

#[test]
fn two_vcpus_share_the_window() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let memory = memory();
    let image = GuestImage::build(&memory, GuestConfig { privilege: Privilege::User, vcpus: 2 });
    let half = image.window_len() / 2;
    let first = Program { pattern: Pattern::Random, seed: 3, ..Program::write_all(half) };
    let programs = [first, Program { start: half, seed: 4, ..first }];
    for (vcpu, program) in (0..).zip(&programs) {
        image.write_program(&memory, vcpu, program);
    }
    let mut oracle = Oracle::capture(&image, &memory);
    let (_vm, mut vcpus) = machine(&kvm, &memory, &image);
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            scope.spawn(|| assert_eq!(next_signal(vcpu), Signal::Done));
        }
    });
    for (vcpu, &program) in (0..).zip(&programs) {
        oracle.advance(vcpu, &mut Walker::new(program), u64::MAX);
    }
    oracle.compare(&memory).unwrap();
}

#[test]
fn a_lost_register_shows() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let memory = memory();
    let image = GuestImage::build(&memory, GuestConfig { privilege: Privilege::User, vcpus: 1 });
    image.write_program(&memory, 0, &Program { report_every: 10, ..Program::write_all(image.window_len()) });
    let (_vm, mut vcpus) = machine(&kvm, &memory, &image);
    assert_eq!(next_signal(&mut vcpus[0]), Signal::Progress);
    let mut regs = vcpus[0].get_regs().unwrap();
    regs.r9 ^= 1;
    vcpus[0].set_regs(&regs).unwrap();
    assert_eq!(next_signal(&mut vcpus[0]), Signal::Mismatch);
}

#[test]
fn an_exception_is_told() {
    require!(Kvm);
    for privilege in [Privilege::Kernel, Privilege::User] {
        let kvm = Kvm::new().unwrap();
        let memory = memory();
        let image = GuestImage::build(&memory, GuestConfig { privilege, vcpus: 1 });
        image.write_program(&memory, 0, &Program::write_all(image.window_len()));
        let (_vm, mut vcpus) = machine(&kvm, &memory, &image);
        let mut regs = vcpus[0].get_regs().unwrap();
        regs.r12 = layout::WINDOW + image.window_len();
        vcpus[0].set_regs(&regs).unwrap();
        assert_eq!(next_signal(&mut vcpus[0]), Signal::Exception(14), "{privilege:?}");
    }
}
