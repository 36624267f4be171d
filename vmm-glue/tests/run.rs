//! vCPUs run, stop and go on.

mod common;

use std::time::{Duration, Instant};

use common::{PATIENCE, Rig, VARIANTS};
use testkit::guest::{Privilege, Program, Signal};
use testkit::require;
use vmm_glue::{Backing, MachineConfig};

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
