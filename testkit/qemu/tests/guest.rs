//! The guest and the harness themselves.

use testkit_qemu::guest::{CHANGING, Plan, STATUS, Work};
use testkit_qemu::{Machine, Qemu, Setup, first_difference};

/// Starts it, lets it stand still, and finds in its RAM what the plan says.
fn fills_and_checks(setup: &Setup, plan: &Plan) {
    let mut qemu = Qemu::start(setup, &plan.build()).unwrap();
    qemu.wait_ready().unwrap();
    let (first, _) = qemu.order('?').unwrap();
    let mut last = first;
    while last < first + 3 {
        let (passes, errors) = qemu.order('?').unwrap();
        assert_eq!(errors, 0);
        assert!(passes >= last);
        last = passes;
    }
    let (passes, errors) = qemu.order('s').unwrap();
    assert_eq!(errors, 0);
    let dump = qemu.dump().unwrap();
    let status = qemu.status().unwrap();
    assert_eq!((status.passes[0], status.errors, status.ready), (passes, 0, true));
    let cpus = usize::try_from(plan.cpus).unwrap();
    assert!(status.passes[..cpus].iter().all(|passes| *passes > 0), "{status:?}");
    let mut page = [0; 4096];
    for (start, end) in &plan.ranges {
        for at in (*start..*end).step_by(4096) {
            dump.read(at, &mut page).unwrap();
            for (i, word) in page.chunks(8).enumerate() {
                let address = at + 8 * i as u64;
                let expected = if plan.is_stored(at) { Plan::word(address) } else { 0 };
                assert_eq!(u64::from_le_bytes(word.try_into().unwrap()), expected, "{address:#x}");
            }
        }
    }
    // Still means still: nothing changes while QEMU runs it.
    qemu.execute("cont", serde_json::json!({})).unwrap();
    let later = qemu.dump().unwrap();
    let by_kvm = if setup.kvm { &CHANGING[2..] } else { &[] };
    assert_eq!(first_difference(&dump, &later, by_kvm).unwrap(), None);
    qemu.execute("cont", serde_json::json!({})).unwrap();
    qemu.order('g').unwrap();
    let (after, _) = qemu.order('?').unwrap();
    assert!(after > passes);
    let moved = qemu.dump().unwrap();
    let changed = first_difference(&dump, &moved, by_kvm).unwrap();
    assert!(changed.is_some_and(|at| at >= STATUS), "{changed:x?}");
    assert_eq!(first_difference(&dump, &moved, if setup.kvm { &CHANGING } else { &CHANGING[..2] }).unwrap(), None);
}

#[test]
fn runs_on_pc() {
    testkit::require!(Qemu);
    fills_and_checks(&Setup::new(Machine::Pc, 32), &Plan::check(24 << 20));
}

#[test]
fn runs_on_q35_with_two_processors() {
    testkit::require!(Qemu);
    let plan = Plan { cpus: 2, ..Plan::check(24 << 20) };
    fills_and_checks(&Setup { cpus: 2, virtio: true, ..Setup::new(Machine::Q35, 32) }, &plan);
}

#[test]
fn runs_on_microvm() {
    testkit::require!(Qemu);
    fills_and_checks(&Setup::new(Machine::Microvm, 32), &Plan::check(24 << 20));
}

#[test]
fn runs_above_four_gibibytes() {
    testkit::require!(Qemu);
    let high = (1 << 32, (1 << 32) + (4 << 20));
    let plan = Plan { ranges: vec![(0x20_0000, 0x40_0000), high], ..Plan::check(0x40_0000) };
    let setup = Setup::new(Machine::Pc, 4096);
    let mut qemu = Qemu::start(&setup, &plan.build()).unwrap();
    qemu.wait_ready().unwrap();
    assert_eq!(qemu.order('s').unwrap().1, 0);
    let path = qemu.dir().join("word").display().to_string();
    let arguments = serde_json::json!({"val": high.0, "size": 8, "filename": path});
    qemu.execute("pmemsave", arguments).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), Plan::word(high.0).to_le_bytes());
}

#[test]
fn runs_under_kvm() {
    testkit::require!(Qemu, Kvm);
    let plan = Plan { step: 1024, ..Plan::check(4 << 20) };
    for machine in [Machine::Pc, Machine::Microvm] {
        fills_and_checks(&Setup { kvm: true, ..Setup::new(machine, 32) }, &plan);
    }
}

#[test]
fn writes_generations_in_order() {
    testkit::require!(Qemu);
    let plan = Plan { work: Work::Generations, ..Plan::check(24 << 20) };
    let mut qemu = Qemu::start(&Setup::new(Machine::Pc, 32), &plan.build()).unwrap();
    qemu.wait_ready().unwrap();
    for _ in 0..5 {
        let (before, _) = qemu.order('?').unwrap();
        while qemu.order('?').unwrap().0 == before {}
        let dump = qemu.dump().unwrap();
        let now = qemu.status().unwrap().generation;
        let (mut last, mut word) = (now, [0; 8]);
        for at in (plan.ranges[0].0..plan.ranges[0].1).step_by(4096) {
            dump.read(at, &mut word).unwrap();
            let generation = u64::from_le_bytes(word);
            assert!(generation <= last && generation + 1 >= now, "{at:#x}: {generation} after {last} in {now}");
            last = generation;
        }
        qemu.execute("cont", serde_json::json!({})).unwrap();
    }
}

#[test]
fn the_guest_takes_interrupts() {
    testkit::require!(Qemu);
    let tables = (2 << 20, 3 << 20);
    let plan = Plan { ticks: Some(tables), ranges: vec![(tables.1, 16 << 20)], ..Plan::check(16 << 20) };
    for (machine, cpus) in [(Machine::Pc, 1), (Machine::Q35, 2), (Machine::Microvm, 1)] {
        let mut qemu =
            Qemu::start(&Setup { cpus, ..Setup::new(machine, 32) }, &Plan { cpus, ..plan.clone() }.build()).unwrap();
        qemu.wait_ready().unwrap();
        // At work, standing still, and more often than there are tables.
        for order in ['?', 's'] {
            assert_eq!(qemu.order(order).unwrap().1, 0);
            let before = qemu.ticks().unwrap();
            while qemu.ticks().unwrap() < before + 300 {}
        }
        assert_eq!(qemu.order('g').unwrap().1, 0);
    }
}
