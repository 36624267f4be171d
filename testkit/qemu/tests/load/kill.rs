//! Servers and destinations that die or stall.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use crate::MIB;
use crate::support::{How, Saved};

/// Waits until the guest was started.
pub(crate) fn started(qemu: &mut Qemu) {
    let resumed = qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap();
    assert!(resumed.is_some(), "{}", qemu.stderr());
}

/// Waits until the server too knows that the guest was started: it answers in the order in which it is asked, so it knows
/// when a page comes that was asked for later. Nobody has touched this one.
fn known_as_started(qemu: &mut Qemu) {
    started(qemu);
    qemu.touch(40 * MIB).unwrap();
}

/// Waits until QEMU has a number of bytes of memory in use.
fn grown(qemu: &Qemu, bytes: u64) {
    let until = Instant::now() + Duration::from_secs(30);
    while qemu.resident().unwrap() < bytes {
        assert!(Instant::now() < until, "{} instead of {bytes} bytes", qemu.resident().unwrap());
        std::thread::yield_now();
    }
}

/// Kills the server when a number of bytes have arrived and the guest was started, then recovers.
fn killed_and_recovered(saved: &Saved, bytes: u64, more: &[&str]) {
    let mut qemu = saved.waiting(&saved.setup);
    let before = qemu.resident().unwrap();
    let server = Fastload::start(saved.load_arguments(&qemu, more)).unwrap();
    started(&mut qemu);
    grown(&qemu, before + bytes);
    server.kill().unwrap();
    let state = qemu.qmp().migration().unwrap().0;
    assert!(state.starts_with("postcopy-"), "killed too late to prove anything: {state}");
    let recovered = saved.load(&qemu, &["--recover"]);
    let figures = recovered.figures();
    assert_eq!(figures["recovered"], true);
    let (before, after) = (&figures["received_before_pages"], figures["background_pages"].as_u64().unwrap());
    assert!(before.as_u64().unwrap() > 0 && after > 0, "{figures}");
    saved.is_whole(&mut qemu);
}

#[test]
fn a_killed_server_is_recovered_from_five_points() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 256);
    let saved = Saved::new(&setup, &Plan { step: 512, ..Plan::check(250 * MIB) }, How::default());
    // Of 187 MiB.
    for (bytes, preempt) in [(64 << 10, false), (MIB, true), (8 * MIB, false), (24 * MIB, true), (64 * MIB, false)] {
        let more: &[&str] = if preempt { &["--preempt"] } else { &[] };
        killed_and_recovered(&saved, bytes, more);
    }
}

#[test]
fn a_guest_at_work_waits_for_the_recovery() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup { cpus: 2, virtio: true, ..Setup::new(Machine::Q35, 64) };
    let plan = Plan { cpus: 2, ..Plan::check(60 * MIB) };
    let saved = Saved::new(&setup, &plan, How { at_work: true, ..How::default() });
    killed_and_recovered(&saved, MIB, &["--no-background"]);
    killed_and_recovered(&saved, 8 * MIB, &["--no-background", "--preempt"]);
}

#[test]
fn a_server_that_is_killed_twice_recovers_twice() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Microvm, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    started(&mut qemu);
    server.kill().unwrap();
    qemu.set_capabilities(&[("events", true)]).unwrap();
    qemu.qmp().forget_events();
    let second = Fastload::start(saved.load_arguments(&qemu, &["--no-background", "--recover"])).unwrap();
    qemu.wait_migration("postcopy-active").unwrap();
    second.kill().unwrap();
    qemu.set_capabilities(&[("events", false)]).unwrap();
    assert!(saved.load(&qemu, &["--recover"]).status.success());
    saved.is_whole(&mut qemu);
}

#[test]
fn a_server_that_stalls_holds_the_guest_up_and_no_more() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How { at_work: true, ..How::default() });
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    started(&mut qemu);
    server.signal(Signal::SIGSTOP).unwrap();
    // The monitor answers while the guest waits for its pages.
    assert_eq!(qemu.qmp().migration().unwrap().0, "postcopy-active");
    server.signal(Signal::SIGCONT).unwrap();
    let (passes, errors) = qemu.order('?').unwrap();
    while qemu.order('?').unwrap().0 < passes + 1 {}
    assert_eq!(errors, 0);
    server.signal(Signal::SIGTERM).unwrap();
    assert!(server.finish().unwrap().status.success());
    saved.is_whole(&mut qemu);
}

/// The destination dies after the guest was started and a part of its memory has come to it.
fn dies(saved: &Saved, bytes: u64, more: &[&str]) {
    let mut qemu = saved.waiting(&saved.setup);
    let before = qemu.resident().unwrap();
    let server = Fastload::start(saved.load_arguments(&qemu, more)).unwrap();
    started(&mut qemu);
    if bytes > 0 {
        grown(&qemu, before + bytes);
    }
    qemu.kill().unwrap();
    let ended = server.finish().unwrap();
    // Whatever the system says about the connection.
    assert!(ended.error().starts_with("fastload: QEMU has ended, and its guest with it"), "{ended:?}");
    assert!(ended.error().contains("the connection to QEMU at unix:"), "{ended:?}");
    assert!(!ended.error().contains("not lost"), "{ended:?}");
    assert_eq!(ended.status.code(), Some(1));
}

#[test]
fn a_destination_that_dies_is_named() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    dies(&saved, 0, &["--no-background"]);
    dies(&saved, 0, &["--no-background", "--preempt"]);
}

#[test]
fn a_destination_that_dies_during_the_push_is_named() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 256);
    let saved = Saved::new(&setup, &Plan { step: 512, ..Plan::check(250 * MIB) }, How::default());
    // Of 187 MiB.
    dies(&saved, 8 * MIB, &[]);
    dies(&saved, 24 * MIB, &["--preempt"]);
}

#[test]
fn ctrl_c_drains_and_the_second_one_tells_how_to_recover() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    // At once: the server may not have heard of it.
    started(&mut qemu);
    server.signal(Signal::SIGINT).unwrap();
    let figures = server.finish().unwrap().figures();
    assert!(figures["background_pages"].as_u64().unwrap() * 4096 > 40 * MIB, "{figures}");
    saved.is_whole(&mut qemu);

    // The destination takes nothing any more, so that the first Ctrl-C can't come to its end.
    let mut qemu = saved.waiting(&setup);
    let mut server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    known_as_started(&mut qemu);
    qemu.signal(Signal::SIGSTOP).unwrap();
    server.signal(Signal::SIGINT).unwrap();
    let mut stderr = BufReader::new(server.stderr().unwrap()).lines();
    let first = stderr.next().unwrap().unwrap();
    assert!(first.contains("Ctrl-C again"), "{first}");
    server.signal(Signal::SIGINT).unwrap();
    let last = stderr.map(Result::unwrap).last().unwrap();
    qemu.signal(Signal::SIGCONT).unwrap();
    assert!(!server.finish().unwrap().status.success());
    let command = last.split("until: fastload ").nth(1).unwrap_or_else(|| panic!("{last}"));
    let recovered = Fastload::start(command.split(' ').chain(["--json"])).unwrap().finish().unwrap();
    assert!(recovered.status.success(), "{recovered:?}");
    saved.is_whole(&mut qemu);
    let again = saved.load(&qemu, &["--recover"]);
    assert!(again.error().contains("nothing to recover"), "{again:?}");
    qemu.execute("query-status", json!({})).unwrap();
}

#[test]
fn other_requests_to_end_drain_as_ctrl_c_does() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let mut qemu = saved.waiting(&setup);
        let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
        known_as_started(&mut qemu);
        server.signal(signal).unwrap();
        let figures = server.finish().unwrap().figures();
        assert!(figures["background_pages"].as_u64().unwrap() * 4096 > 40 * MIB, "{signal}: {figures}");
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn a_snapshot_that_changes_meanwhile_is_never_taken_for_complete() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    known_as_started(&mut qemu);
    let before = std::fs::read(&saved.file).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&saved.file).unwrap();
    file.write_all_at(&[0; 4096], 2 * MIB).unwrap();
    server.signal(Signal::SIGINT).unwrap();
    let ended = server.finish().unwrap();
    assert!(ended.error().contains("changed") && ended.error().contains("--recover"), "{ended:?}");
    assert!(qemu.qmp().migration().unwrap().0.starts_with("postcopy-"));
    // The guest still waits, and an intact file brings what is missing: nothing wrong had been sent.
    file.write_all_at(&before[2 << 20..(2 << 20) + 4096], 2 * MIB).unwrap();
    drop(file);
    assert!(saved.load(&qemu, &["--recover"]).status.success());
    saved.is_whole(&mut qemu);
}

/// What is open stays open: another name, other rights, or no name at all take nothing from the guest.
#[test]
fn a_snapshot_that_loses_its_name_meanwhile_is_finished_from() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    known_as_started(&mut qemu);
    let other = saved.file.with_extension("other");
    std::fs::hard_link(&saved.file, &other).unwrap();
    qemu.touch(41 * MIB).unwrap();
    std::fs::rename(&other, saved.file.with_extension("third")).unwrap();
    std::fs::set_permissions(&saved.file, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
    qemu.touch(42 * MIB).unwrap();
    std::fs::remove_file(saved.file.with_extension("third")).unwrap();
    std::fs::remove_file(&saved.file).unwrap();
    qemu.touch(43 * MIB).unwrap();
    server.signal(Signal::SIGINT).unwrap();
    let figures = server.finish().unwrap().figures();
    assert!(figures["background_pages"].as_u64().unwrap() * 4096 > 40 * MIB, "{figures}");
    saved.is_whole(&mut qemu);
}
