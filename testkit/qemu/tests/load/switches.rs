//! `--paused`, `-S`, snapshots of paused guests.

use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Machine, Setup};

use crate::MIB;
use crate::support::{How, Saved};

#[test]
fn paused_means_that_nothing_runs() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How { at_work: true, ..How::default() });
    for preempt in [false, true] {
        let mut qemu = saved.waiting(&setup);
        let more: &[&str] = if preempt { &["--paused", "--preempt"] } else { &["--paused"] };
        let figures = saved.load(&qemu, more).figures();
        assert_eq!((&figures["state"], &figures["running_us"]), (&json!("paused"), &json!(null)), "{figures}");
        assert_eq!(qemu.qmp().run_state().unwrap(), "paused");
        // Not a byte has changed, not even those that a guest at work changes.
        let loaded = qemu.dump().unwrap();
        assert_eq!(testkit_qemu::first_difference(&saved.ram, &loaded, &[]).unwrap(), None);
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn a_guest_that_was_paused_stays_so() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let plan = Plan::check(16 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("snapshot");
    let mut qemu = testkit_qemu::Qemu::start(&setup, &plan.build()).unwrap();
    qemu.wait_ready().unwrap();
    qemu.execute("stop", json!({})).unwrap();
    qemu.save(&file, false, false).unwrap();
    let mut other = testkit_qemu::Qemu::start(&setup.waiting(), &plan.build()).unwrap();
    let arguments = crate::support::load_arguments(&file, &other, &[]);
    let figures = testkit_qemu::Fastload::start(arguments).unwrap().finish().unwrap().figures();
    assert_eq!(figures["state"], "paused");
    assert_eq!(other.qmp().run_state().unwrap(), "paused");
    other.execute("cont", json!({})).unwrap();
    let (passes, errors) = other.order('?').unwrap();
    assert!(passes > 0 && errors == 0);
}

#[test]
fn a_qemu_started_with_s_stays_paused() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let mut qemu = saved.waiting(&Setup { stopped: true, ..setup });
    let figures = saved.load(&qemu, &[]).figures();
    assert_eq!(figures["state"], "paused", "{figures}");
    saved.is_whole(&mut qemu);
}
