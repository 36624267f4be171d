//! `fastload serve`: the sockets, without QMP.

use std::net::TcpListener;

use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use crate::MIB;
use crate::support::{How, Saved};

/// A QEMU that listens at `uri`.
pub(crate) fn listening(saved: &Saved, uri: &str, preempt: bool) -> Qemu {
    let mut qemu = saved.waiting(&saved.setup);
    qemu.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)]).unwrap();
    qemu.execute("migrate-incoming", json!({"uri": uri})).unwrap();
    qemu
}

pub(crate) fn serve(saved: &Saved, to: &str, more: &[&str]) -> Fastload {
    let file = saved.file.display().to_string();
    Fastload::start(["serve", &file, "--to", to, "--json"].iter().chain(more)).unwrap()
}

#[test]
fn a_guest_is_served_over_unix_and_tcp_with_and_without_preempt() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How { at_work: true, ..How::default() });
    let dir = tempfile::tempdir().unwrap();
    for (tcp, preempt) in [(false, false), (false, true), (true, false), (true, true)] {
        let uri = if tcp {
            // Free a moment ago; QEMU takes it at once.
            let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            format!("tcp:{free}")
        } else {
            format!("unix:{}", dir.path().join(format!("in{preempt}")).display())
        };
        let mut qemu = listening(&saved, &uri, preempt);
        let more: &[&str] = if preempt { &["--preempt"] } else { &[] };
        let figures = serve(&saved, &uri, more).finish().unwrap().figures();
        assert!(figures["started_us"].as_u64() <= figures["complete_us"].as_u64(), "{figures}");
        qemu.set_capabilities(&[("postcopy-ram", false), ("postcopy-preempt", false)]).unwrap();
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn recovers_at_an_address_that_qemu_was_given() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Microvm, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    let dir = tempfile::tempdir().unwrap();
    let uri = |name: &str| format!("unix:{}", dir.path().join(name).display());
    let mut qemu = listening(&saved, &uri("first"), false);
    qemu.set_capabilities(&[("events", true)]).unwrap();
    let first = serve(&saved, &uri("first"), &["--no-background"]);
    qemu.qmp().wait_event(&["RESUME"], std::time::Duration::from_secs(30)).unwrap().unwrap();
    first.kill().unwrap();
    qemu.wait_migration("postcopy-paused").unwrap();
    qemu.execute("migrate-recover", json!({"uri": uri("second")})).unwrap();
    let figures = serve(&saved, &uri("second"), &["--recover"]).finish().unwrap().figures();
    assert!(figures["background_pages"].as_u64().unwrap() > 10_000, "{figures}");
    qemu.set_capabilities(&[("events", false), ("postcopy-ram", false)]).unwrap();
    saved.is_whole(&mut qemu);
}

#[test]
fn what_is_not_there_is_named() {
    let ended = Fastload::start(["serve", "/nonexistent", "--to", "unix:/nonexistent"]).unwrap().finish().unwrap();
    assert!(ended.error().contains("/nonexistent"), "{ended:?}");
    let ended = Fastload::start(["serve", "/nonexistent", "--to", "fd:3"]).unwrap().finish().unwrap();
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
}
