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
        let setup = Setup::new(machine, 64);
        let saved = saved_for_both(&setup, &Plan::check(60 * MIB));
        saved.loads_into(&setup.older(), &[]);
    }
}
