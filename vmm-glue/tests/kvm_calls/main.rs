//! Time and state of vCPUs, on KVMs other than this machine's: what is asked of them, in which order, and what becomes of
//! it. The real KVM does all that the model of [`kernel`] does not.

#[path = "../common/mod.rs"]
mod common;
mod kernel;

use std::sync::Arc;
use std::time::Instant;

use common::{PATIENCE, Rig, Signals};
use kernel::{Model, Tsc, Turn, now};
use kvm_ioctls::Kvm;
use proptest::prelude::*;
use testkit::guest::Privilege;
use testkit::require;
use vm_memory::{Bytes, GuestAddress};
use vmm_glue::{
    Backing, ClockPolicy, Host, LiveOptions, MachineConfig, MachineState, NewVm, RestoreOptions, SaveOptions, SavedVm,
    StateError, TscMethod, snapshot_live,
};

fn rig(vcpus: u32) -> Rig {
    Rig::boot(Privilege::User, MachineConfig::full(vcpus), Backing::Memfd, 50)
}

fn counter(state: &MachineState, vcpu: usize) -> u64 {
    state.vcpus[vcpu].msr(0x10).unwrap()
}

fn set_counter(state: &mut MachineState, vcpu: usize, value: u64) {
    let found = state.vcpus[vcpu].msrs.iter_mut().find(|(index, _)| *index == 0x10);
    found.unwrap().1 = value;
}

fn hz(kvm: &Kvm) -> u64 {
    let vm = kvm.create_vm().unwrap();
    u64::from(vm.create_vcpu(0).unwrap().get_tsc_khz().unwrap()) * 1000
}

/// Puts `state` into the machine and looks where the counters are.
fn put(rig: &Rig, state: &MachineState, host: &Host) -> (MachineState, u64) {
    let before = now();
    rig.vcpus.restore_state(state, host).unwrap();
    let after = rig.vcpus.save_state(host).unwrap();
    (after, now() - before)
}

/// How far from now, in thousandths of a second: what KVM takes for an attempt at bringing counters into step, and not.
fn distances() -> impl Strategy<Value = Vec<i64>> {
    prop::collection::vec(prop_oneof![-999..999i64, -5000..5000i64, Just(0), Just(1), Just(-1)], 1..6)
}

#[test]
fn counters_are_put_back_exactly_each_time_however_little_they_have_moved() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let hz = hz(&kvm);
    for (tsc, method) in [(Tsc::Offsets, TscMethod::Offset), (Tsc::Register, TscMethod::Register)] {
        let turn = Turn::new(Model { tsc, hz, ..Model::default() });
        let host = Host::probe(&kvm).unwrap();
        assert_eq!(host.tsc_method(), method);
        let rig = rig(2);
        let saved = rig.vcpus.save_state(&host).unwrap();
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: 24,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let ran = runner.run(&(distances(), 0..1u64 << 40, any::<bool>()), |(distances, apart, told)| {
            for distance in distances {
                let mut state = saved.clone();
                let ticks = distance * i64::try_from(hz / 1000).unwrap();
                let current = counter(&rig.vcpus.save_state(&host).unwrap(), 0);
                let wanted = current.wrapping_add_signed(ticks);
                // The second counter is as far from the first as its offset says, or, if that was not saved, in step.
                let apart = if method == TscMethod::Offset && told { apart } else { 0 };
                set_counter(&mut state, 0, wanted);
                // They are read one after the other.
                set_counter(&mut state, 1, wanted.wrapping_add(apart) + 1000);
                state.vcpus[0].tsc_offset = told.then_some(7);
                state.vcpus[1].tsc_offset = told.then_some(7 + apart);
                let (has, took) = put(&rig, &state, &host);
                for (vcpu, wanted) in [(0, wanted), (1, wanted.wrapping_add(apart))] {
                    let ahead = counter(&has, vcpu).wrapping_sub(wanted);
                    prop_assert!(ahead <= took, "vCPU {vcpu} is {ahead} ticks ahead, in {took}; {distance} ms");
                }
                if method == TscMethod::Offset {
                    let offset = |vcpu: usize| has.vcpus[vcpu].tsc_offset.unwrap();
                    prop_assert_eq!(offset(1).wrapping_sub(offset(0)), apart, "no tick more or less");
                }
            }
            Ok(())
        });
        ran.unwrap();
        drop(rig);
        drop(turn);
    }
}

#[test]
fn a_kvm_that_ignores_counters_is_named() {
    require!(Kvm);
    let _turn = Turn::new(Model::default());
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let rig = rig(1);
    let mut state = rig.vcpus.save_state(&host).unwrap();
    let wanted = counter(&state, 0) >> 1;
    set_counter(&mut state, 0, wanted);
    let before = now();
    let restored = rig.vcpus.restore_state(&state, &host).unwrap();
    assert_eq!(restored.tsc, host.tsc_method());
    let ahead = counter(&rig.vcpus.save_state(&host).unwrap(), 0).wrapping_sub(wanted);
    assert_eq!(restored.tsc == TscMethod::Ignored, ahead > now() - before, "{restored:?}: {ahead} ticks ahead");
}

#[test]
fn a_restore_from_a_file_puts_counters_back_and_can_catch_up() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let hz = hz(&kvm);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    for tsc in [Tsc::Offsets, Tsc::Register] {
        let _turn = Turn::new(Model { tsc, hz, ..Model::default() });
        let host = Host::probe(&kvm).unwrap();
        let rig = rig(2);
        rig.step();
        let saved_at = Instant::now();
        let mut state = rig.vcpus.save_state(&host).unwrap();
        // It was saved an hour ago.
        let hour = 3_600_000_000_000;
        *state.vm.realtime.as_mut().unwrap() -= hour;
        for clock in [ClockPolicy::GoOn, ClockPolicy::CatchUp] {
            let machine = NewVm::new(&kvm, Arc::clone(&rig.ram), MachineConfig::full(2)).unwrap();
            let vcpus: Vec<_> = machine.vcpus().iter().collect();
            let begun = Instant::now();
            let restored = state.restore_with_clock(machine.vm(), &vcpus, &host, clock).unwrap();
            let has = MachineState::save(machine.vm(), &vcpus, &host, true, true).unwrap();
            let caught_up = if clock == ClockPolicy::CatchUp { hour } else { 0 };
            let passed = has.vm.clock.unwrap() - state.vm.clock.unwrap();
            // What catches up does so with the time since it was saved, too.
            let since = if clock == ClockPolicy::CatchUp { saved_at.elapsed() } else { begun.elapsed() };
            let most = caught_up + u64::try_from(since.as_nanos()).unwrap();
            assert!((caught_up..=most).contains(&passed), "{clock:?}: {passed} ns");
            let reported = u64::try_from(restored.caught_up.as_nanos()).unwrap();
            assert!(reported >= caught_up && (reported == 0) == (caught_up == 0), "{restored:?}");
            for vcpu in 0..2 {
                let ahead = counter(&has, vcpu).wrapping_sub(counter(&state, vcpu));
                // One clock runs by the host's counter, the other by its clock: both are disciplined, within 0.1 %.
                let ticks = |ns: u64| u128::from(ns) * u128::from(hz) / 1_000_000_000;
                let (least, most) = (ticks(caught_up), ticks(most) * 1001 / 1000);
                assert!((least..=most).contains(&u128::from(ahead)), "{clock:?}, {tsc:?}: vCPU {vcpu} {ahead}");
            }
        }
        // Through a file: the counter of a VM that is a moment old is no excuse.
        vmm_glue::save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
        let saved = SavedVm::open(&path, &kvm, &host).unwrap();
        let options = RestoreOptions::default().paused();
        let before = now();
        let vm = saved.restore_eager(&kvm, &host, Arc::new(Signals::default()), &options).unwrap();
        let has = vm.vcpus().save_state(&host).unwrap();
        let ahead = counter(&has, 0).wrapping_sub(counter(saved.state(), 0));
        assert!(ahead <= now() - before, "{ahead} ticks ahead");
        assert_eq!(vm.report().time.tsc, host.tsc_method());
    }
}

#[test]
fn a_snapshot_that_does_not_say_when_it_was_taken_can_not_catch_up() {
    require!(Kvm);
    let _turn = Turn::new(Model::default());
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let rig = rig(1);
    let mut state = rig.vcpus.save_state(&host).unwrap();
    state.vm.realtime = None;
    let machine = NewVm::new(&kvm, Arc::clone(&rig.ram), MachineConfig::full(1)).unwrap();
    let vcpus: Vec<_> = machine.vcpus().iter().collect();
    let error = state.restore_with_clock(machine.vm(), &vcpus, &host, ClockPolicy::CatchUp).unwrap_err();
    assert!(error.to_string().contains("the time at which the snapshot was taken"), "{error}");
}

#[test]
fn registers_are_read_before_the_local_apic() {
    require!(Kvm);
    let turn = Turn::new(Model::default());
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let rig = rig(2);
    drop(turn.log());
    rig.vcpus.save_state(&host).unwrap();
    let log = turn.log();
    let vcpus: Vec<i32> = log.iter().filter(|call| call.1 == kernel::GET_LAPIC).map(|call| call.0).collect();
    assert_eq!(vcpus.len(), 2);
    for vcpu in vcpus {
        let of = |request: u64| {
            let mut at = (0..log.len()).filter(|&at| log[at].0 == vcpu && log[at].1 == request);
            (at.next().unwrap(), at.next_back())
        };
        let (first, last) = of(kernel::GET_MSRS);
        assert!(last.unwrap_or(first) < of(kernel::GET_LAPIC).0, "{log:?}");
    }
}

#[test]
fn extended_state_is_as_long_as_kvm_says_when_it_is_used() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    for (probed, used) in [(None, 11_008), (Some(4096), 11_008), (Some(4096), 4100), (Some(11_008), 4096)] {
        let turn = Turn::new(Model { xsave: probed, ..Model::default() });
        let host = Host::probe(&kvm).unwrap();
        let rig = rig(1);
        // The VMM has asked for AMX since, or is another process of the same host.
        let tail: Vec<u8> = (0..used - 4096).map(|at| u8::try_from(at % 251).unwrap() | 1).collect();
        turn.with(|model| (model.xsave, model.tail) = (Some(used), tail.clone()));
        let state = rig.vcpus.save_state(&host).unwrap();
        let words = &state.vcpus[0].xsave;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(bytes[4096..used], tail);
        turn.with(|model| model.tail.clear());
        rig.vcpus.restore_state(&state, &host).unwrap();
        assert_eq!(turn.with(|model| model.tail.clone()), tail);
        // What a host with less can't have is named; zeros are no reason.
        turn.with(|model| model.xsave = Some(4096));
        let lacks: Vec<String> = host.lacks(&kvm, &state).unwrap().iter().map(ToString::to_string).collect();
        let named =
            lacks.iter().any(|lack| lack.contains(&format!("extended state (XSAVE) of {} bytes", words.len() * 4)));
        assert_eq!(named, used > 4096, "{lacks:?}");
        // Words that the file lacks are zero.
        turn.with(|model| (model.xsave, model.tail) = (Some(used), tail.clone()));
        let mut shorter = state.clone();
        shorter.vcpus[0].xsave.truncate(1024);
        rig.vcpus.restore_state(&shorter, &host).unwrap();
        assert!(turn.with(|model| model.tail.iter().all(|&byte| byte == 0)));
    }
}

#[test]
fn a_debugging_register_that_does_not_take_is_named() {
    require!(Kvm);
    for keeps_debugctl in [true, false] {
        let _turn = Turn::new(Model { keeps_debugctl, ..Model::default() });
        let host = Host::probe(&Kvm::new().unwrap()).unwrap();
        let rig = rig(1);
        let mut state = rig.vcpus.save_state(&host).unwrap();
        let register = state.vcpus[0].msrs.iter_mut().find(|(index, _)| *index == 0x1d9).unwrap();
        register.1 = 1;
        let restored = rig.vcpus.restore_state(&state, &host);
        if keeps_debugctl {
            restored.unwrap();
            assert_eq!(rig.vcpus.save_state(&host).unwrap().vcpus[0].msr(0x1d9), Some(1));
        } else {
            let error = restored.unwrap_err();
            assert!(matches!(error, StateError::Msr { index: 0x1d9, vcpu: 0, value: 1 }), "{error}");
        }
    }
}

/// A page of the guest that it uses for nothing else.
const FREE_PAGE: u64 = 0x1f_f000;

fn set_msr(state: &mut MachineState, index: u32, value: u64) {
    let found = state.vcpus[0].msrs.iter_mut().find(|(found, _)| *found == index);
    found.unwrap().1 = value;
}

#[test]
fn a_reset_forgets_pages_that_the_guest_waited_for_and_wakes_all_who_waited() {
    require!(Kvm);
    let turn = Turn::new(Model::default());
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let rig = rig(1);
    let mut state = rig.vcpus.save_state(&host).unwrap();
    // On, by interrupt (Linux Documentation/virt/kvm/x86/msr.rst), of a local APIC that is on.
    let enabled = FREE_PAGE | 1 | 8;
    set_msr(&mut state, kernel::ASYNC_PF_EN, enabled);
    set_msr(&mut state, 0x4b56_4d06, 0xf3);
    state.vcpus[0].lapic.as_mut().unwrap().regs[0xf1] |= 1;
    drop(turn.log());
    rig.vcpus.restore_state(&state, &host).unwrap();
    let log = turn.log();
    let written = log.iter().flat_map(|call| &call.2).filter(|(index, _)| *index == kernel::ASYNC_PF_EN);
    assert_eq!(written.map(|&(_, value)| value).collect::<Vec<_>>(), [0, enabled]);
    rig.step();
    // The token of `struct kvm_vcpu_pv_apf_data` that stands for all.
    let token: u32 = rig.ram.memory().read_obj(GuestAddress(FREE_PAGE + 4)).unwrap();
    assert_eq!(token, u32::MAX);
}

#[test]
fn a_guest_with_a_clock_page_finds_there_that_it_was_stopped() {
    require!(Kvm, Userfaultfd);
    let _turn = Turn::new(Model::default());
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let rig = rig(1);
    let mut state = rig.vcpus.save_state(&host).unwrap();
    set_msr(&mut state, 0x4b56_4d01, FREE_PAGE | 1);
    rig.vcpus.restore_state(&state, &host).unwrap();
    rig.step();
    // `flags` of `struct pvclock_vcpu_time_info`, and in it PVCLOCK_GUEST_STOPPED.
    let flags = || rig.ram.memory().read_obj::<u8>(GuestAddress(FREE_PAGE + 29)).unwrap();
    for stop in STOPS {
        rig.ram.memory().write_obj(flags() & !2, GuestAddress(FREE_PAGE + 29)).unwrap();
        stop_for(stop, &rig, &host, &path);
        rig.step();
        assert_eq!(flags() & 2, 2, "{stop}");
    }
}

/// What a guest stops for.
const STOPS: [&str; 5] = ["device", "pause", "save", "live", "reset"];

fn stop_for(stop: &str, rig: &Rig, host: &Host, path: &std::path::Path) {
    match stop {
        "pause" => rig.vcpus.pause(PATIENCE).unwrap(),
        "save" => drop(vmm_glue::save(&rig.vcpus, host, path, &SaveOptions::default()).unwrap()),
        "live" => drop(snapshot_live(&rig.vcpus, host, path, &LiveOptions::default()).unwrap().wait().unwrap()),
        "reset" => drop(rig.vcpus.restore_state(&rig.vcpus.save_state(host).unwrap(), host).unwrap()),
        _ => assert_eq!(stop, "device"),
    }
}

#[test]
fn a_guest_is_told_of_every_stop_before_it_runs_again() {
    require!(Kvm, Userfaultfd);
    let turn = Turn::new(Model::default());
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let rig = rig(2);
    rig.step();
    for stop in STOPS {
        drop(turn.log());
        stop_for(stop, &rig, &host, &path);
        rig.step();
        let log = turn.log();
        let vcpus: std::collections::BTreeSet<i32> =
            log.iter().filter(|call| call.1 == kernel::RUN).map(|call| call.0).collect();
        assert_eq!(vcpus.len(), 2, "{stop}");
        for vcpu in vcpus {
            let mut of = log.iter().filter(|call| call.0 == vcpu).map(|call| call.1);
            let told = of.by_ref().take_while(|&call| call != kernel::RUN).any(|call| call == kernel::KVMCLOCK_CTRL);
            assert!(told, "{stop}: vCPU {vcpu} ran before it was told: {log:?}");
        }
    }
    // While it runs: the blackout of a live snapshot.
    let (vcpus, image, _) = common::live::boot(&common::live::Kind::SMALL, MachineConfig::bare(1));
    vcpus.resume();
    common::live::progress(&vcpus, &image, 20);
    drop(turn.log());
    snapshot_live(&vcpus, &host, &path, &LiveOptions::default()).unwrap().wait().unwrap();
    common::live::progress(&vcpus, &image, 20);
    vcpus.pause(PATIENCE).unwrap();
    let told = turn.log().iter().filter(|call| call.1 == kernel::KVMCLOCK_CTRL).count();
    assert_eq!(told, 1, "one stop, told once");
}
