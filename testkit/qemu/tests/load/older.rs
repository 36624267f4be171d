//! The older QEMU that people still have.

use testkit_qemu::guest::Plan;
use testkit_qemu::{Machine, Setup};

use crate::MIB;
use crate::support::{How, Saved};

/// A guest that a newer QEMU saved from a machine that both know.
pub(crate) fn saved_for_both(setup: &Setup, plan: &Plan) -> Saved {
    Saved::new(&Setup { older: false, ..setup.older() }, plan, How::default())
}

#[test]
fn a_guest_goes_on_in_an_older_qemu() {
    testkit::require!(Qemu, OlderQemu, Userfaultfd);
    for machine in [Machine::Pc, Machine::Q35] {
        let setup = Setup::new(machine, 32);
        let saved = saved_for_both(&setup, &Plan::check(16 * MIB));
        saved.loads_into(&setup.older(), &[]);
    }
}

/// It has a capability of that name, and means something else: nothing is begun.
#[test]
fn preempt_is_refused_by_version_and_changes_nothing() {
    testkit::require!(Qemu, OlderQemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 32);
    let saved = saved_for_both(&setup, &Plan::check(16 * MIB));
    crate::refuse::refused_with(&saved, &setup.older(), &["--preempt"], &["QEMU 8.0", "QEMU 7.2", "without --preempt"]);
    saved.loads_into(&setup.older(), &[]);
}
