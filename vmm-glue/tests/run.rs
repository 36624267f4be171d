//! vCPUs run, stop and go on.

mod common;

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use common::{PATIENCE, Rig, VARIANTS};
use kvm_ioctls::Kvm;
use page_units::{ByteLen, GuestAddr};
use testkit::gate::Gate;
use testkit::guest::{Privilege, Program, Signal};
use testkit::require;
use vm_memory::{Bytes, GuestAddress};
use vmm_glue::{Backing, Bus, GuestRam, MachineConfig, NewVm, Next, RamSpec, StopError, VcpuOptions, Vcpus};

#[test]
fn guests_do_their_work_at_both_levels() {
    require!(Kvm);
    for (privilege, vcpus) in VARIANTS {
        let mut rig = Rig::boot(privilege, MachineConfig::bare(vcpus), Backing::Memfd, 0);
        rig.finish();
    }
}

#[test]
fn a_device_stops_its_vcpu_with_the_access_completed() {
    require!(Kvm);
    let mut rig = Rig::boot(Privilege::User, MachineConfig::bare(1), Backing::Anonymous, 100);
    for round in 1..=3 {
        assert_eq!(rig.step(), [(0, Signal::Progress)]);
        rig.oracle.advance(0, &mut rig.walkers[0], round * 100);
        rig.oracle.compare(rig.ram.memory()).unwrap();
    }
    rig.finish();
}

#[test]
fn a_guest_is_kicked_out_of_its_loop_at_any_moment() {
    require!(Kvm);
    for (privilege, vcpus) in VARIANTS {
        let mut rig = Rig::boot(privilege, MachineConfig::bare(vcpus), Backing::Memfd, 0);
        let endless = |program: &Program| Program { steps: u64::MAX, ..*program };
        let programs: Vec<Program> = common::programs(&rig.image, 0, 5).iter().map(endless).collect();
        for (vcpu, program) in (0..).zip(&programs) {
            rig.image.write_program(rig.ram.memory(), vcpu, program);
        }
        let counters = |rig: &Rig| -> Vec<u64> {
            (0..rig.image.config().vcpus).map(|vcpu| rig.image.report(rig.ram.memory(), vcpu).counter).collect()
        };
        let mut before = vec![0; programs.len()];
        for _ in 0..20 {
            rig.vcpus.resume();
            let begun = Instant::now();
            while counters(&rig).iter().zip(&before).any(|(now, before)| now <= before) {
                assert!(begun.elapsed() < PATIENCE, "no progress");
                std::thread::yield_now();
            }
            rig.vcpus.pause(PATIENCE).unwrap();
            before = counters(&rig);
            assert_eq!(counters(&rig), before, "it runs although it was stopped");
        }
        for (vcpu, program) in (0..).zip(&programs) {
            let finite = Program { steps: before[usize::from(vcpu)] + 50, ..*program };
            rig.image.write_program(rig.ram.memory(), vcpu, &finite);
            rig.walkers[usize::from(vcpu)] = testkit::guest::Walker::new(finite);
        }
        // The oracle starts over with the programs as they are now, and with what they had before.
        let fresh = Rig::boot(privilege, MachineConfig::bare(vcpus), Backing::Memfd, 0);
        for (vcpu, walker) in (0..).zip(&rig.walkers) {
            fresh.image.write_program(fresh.ram.memory(), vcpu, walker.program());
        }
        rig.oracle = testkit::guest::Oracle::capture(&fresh.image, fresh.ram.memory());
        rig.finish();
    }
}

#[test]
fn dropping_stops_a_guest_that_never_ends() {
    require!(Kvm);
    let rig = Rig::boot(Privilege::User, MachineConfig::bare(2), Backing::Memfd, 0);
    for (vcpu, program) in (0..).zip(common::programs(&rig.image, 0, 5)) {
        rig.image.write_program(rig.ram.memory(), vcpu, &Program { steps: u64::MAX, ..program });
    }
    rig.vcpus.resume();
    assert!(rig.vcpus.wait_stopped(Duration::from_millis(1)).is_err());
    drop(rig);
}

/// Writes over the border of two pages that are a device's: two accesses of one instruction. Then writes to a port, and
/// so on for ever.
const TWO_ACCESSES: [u8; 16] = [
    0xb8, 0x00, 0x20, // mov ax, 0x2000
    0x8e, 0xc0, // mov es, ax
    0x66, 0x26, 0xa3, 0xfe, 0x0f, // mov es:[0xffe], eax
    0xb0, 0x01, // mov al, 1
    0xe6, 0xe9, // out 0xe9, al
    0xeb, 0xf5, // jmp to the second mov
];

/// A device that takes its time for each access.
struct Slow {
    first: Gate,
    second: Gate,
    port: SyncSender<()>,
}

impl Bus for Slow {
    fn mmio_write(&self, _: u32, address: u64, _: &[u8]) -> Next {
        if address == 0x2_0ffe {
            self.first.enter()
        } else {
            self.second.enter()
        }
        Next::Run
    }

    fn io_out(&self, _: u32, _: u16, _: &[u8]) -> Next {
        // Until nobody wants to know any more.
        if self.port.send(()).is_ok() { Next::Run } else { Next::Stop }
    }
}

/// Stopping took too long, and was taken back while a vCPU was about to stop: it goes on.
#[test]
fn a_stop_that_is_taken_back_is_no_stop() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let spec = RamSpec::new("ram").at(GuestAddr(0), ByteLen(0x1_0000));
    let ram = Arc::new(GuestRam::allocate(&[spec], Backing::Anonymous).unwrap());
    ram.memory().write_slice(&TWO_ACCESSES, GuestAddress(0x1000)).unwrap();
    let machine = NewVm::new(&kvm, ram, MachineConfig::bare(1)).unwrap();
    let vcpu = &machine.vcpus()[0];
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0x1000;
    vcpu.set_regs(&regs).unwrap();
    let (port, written) = sync_channel(0);
    let slow = Arc::new(Slow { first: Gate::closed(), second: Gate::closed(), port });
    let vcpus = Vcpus::start(machine, Arc::clone(&slow) as Arc<dyn Bus>, VcpuOptions::default()).unwrap();

    slow.first.wait_for(1);
    let error = vcpus.pause(Duration::ZERO).unwrap_err();
    assert!(matches!(error, StopError::Timeout { .. }), "{error}");
    // It completes the instruction, and is about to stop.
    slow.first.open();
    slow.second.wait_for(1);
    vcpus.resume();
    slow.second.open();
    written.recv_timeout(PATIENCE).expect("it goes on");
    drop(written);
    vcpus.wait_stopped(PATIENCE).unwrap();
}
