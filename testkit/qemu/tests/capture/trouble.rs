//! Captures that are cancelled, killed, refused, or fail.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use mapped_ram::Snapshot;
use nix::sys::signal::Signal;
use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use crate::support::{MIB, Place, arguments, at_work, block, capture, figures, goes_on, is_as_before, is_one_instant};

/// Starts a capture and waits for the freeze point; the rest of its standard error is what follows.
fn frozen(qemu: &Qemu, file: &Path, more: &[&str]) -> (Fastload, impl Iterator<Item = String> + use<>) {
    let mut running = Fastload::start(arguments(qemu, file, more)).unwrap();
    let mut stderr = BufReader::new(running.stderr().unwrap()).lines().map(Result::unwrap);
    let line = stderr.next().unwrap();
    assert!(line.contains("frozen at"), "{line}");
    (running, stderr)
}

/// Long enough to be interrupted.
fn long() -> Setup {
    Setup::new(Machine::Pc, 256)
}

#[test]
fn ctrl_c_leaves_the_guest_running_and_the_old_file() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&long());
    let place = Place::new();
    fs::write(place.file(), "the old one").unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let (running, stderr) = frozen(&qemu, &place.file(), &[]);
        running.signal(signal).unwrap();
        let error = stderr.last().unwrap();
        assert!(error.contains("cancelled"), "{error}");
        assert!(!running.finish().unwrap().status.success());
        is_as_before(&mut qemu);
        goes_on(&mut qemu);
        assert_eq!(place.files(), ["vm.snap"]);
        assert_eq!(fs::read_to_string(place.file()).unwrap(), "the old one");
    }
    // And the next one succeeds.
    let ended = capture(&qemu, &place.file(), &["--json"]);
    figures(&ended);
    is_one_instant(&block(&Snapshot::open(place.file()).unwrap(), "pc.ram"), &long());
}

#[test]
fn a_capture_that_is_killed_leaves_the_guest_running() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&long());
    let place = Place::new();
    let (running, _) = frozen(&qemu, &place.file(), &[]);
    running.kill().unwrap();
    goes_on(&mut qemu);
    assert_eq!(place.files(), [""; 0]);
    // Its settings could not be put back. QEMU notices by itself that nobody reads.
    while qemu.qmp().migration().unwrap().0 == "active" {}
    assert_eq!(qemu.qmp().migration().unwrap().0, "failed");
    assert!(qemu.qmp().capabilities().unwrap().0["background-snapshot"]);
    let again = capture(&qemu, &place.file(), &["--json"]);
    figures(&again);
    // The next one puts back what the killed one could not.
    assert!(again.stderr.contains("as a capture that was killed leaves it; it will be turned off"), "{again:?}");
    assert!(!qemu.qmp().capabilities().unwrap().0["background-snapshot"]);
    is_one_instant(&block(&Snapshot::open(place.file()).unwrap(), "pc.ram"), &long());
    goes_on(&mut qemu);
}

#[test]
fn a_qemu_that_dies_leaves_no_file() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&long());
    let place = Place::new();
    let (running, stderr) = frozen(&qemu, &place.file(), &[]);
    qemu.kill().unwrap();
    let error = stderr.last().unwrap();
    assert!(error.contains("QEMU closed its QMP socket"), "{error}");
    assert!(!running.finish().unwrap().status.success());
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn a_qemu_without_the_right_to_userfaultfd_is_refused_by_name() {
    testkit::require!(Qemu, Root);
    let mut qemu = at_work(&Setup { user: Some(65534), ..Setup::new(Machine::Pc, 32) });
    let place = Place::new();
    let ended = capture(&qemu, &place.file(), &["--json"]);
    let allowed = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if allowed.trim() == "1" {
        figures(&ended);
    } else {
        for word in ["Background-snapshot", "/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1"] {
            assert!(ended.error().contains(word), "{ended:?}");
        }
        assert_eq!(place.files(), [""; 0]);
    }
    is_as_before(&mut qemu);
    goes_on(&mut qemu);
}

#[test]
fn a_capability_that_a_user_turned_on_stays_on_and_how_to_turn_it_off_is_told() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 32));
    // QEMU finds now and then, for no reason, that its memory does not allow it.
    let tries: Vec<_> =
        (0..100).map(|_| qemu.set_capabilities(&[("background-snapshot", true)])).take_while(Result::is_err).collect();
    assert!(tries.len() < 100, "{:?}", tries.last());
    let place = Place::new();
    let ended = capture(&qemu, &place.file(), &["--json"]);
    figures(&ended);
    assert!(qemu.qmp().capabilities().unwrap().0["background-snapshot"]);
    let (_, command) = ended.stderr.lines().find_map(|line| line.split_once("to turn it off: ")).unwrap();
    let command: serde_json::Value = serde_json::from_str(command).unwrap();
    qemu.execute(command["execute"].as_str().unwrap(), command["arguments"].clone()).unwrap();
    is_as_before(&mut qemu);
}

/// A file system of a few MiB, while this value lives.
struct Small(Place);

impl Small {
    fn new(megabytes: u64) -> Small {
        let place = Place::new();
        let options = format!("size={megabytes}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(place.0.path()).status();
        assert!(mount.unwrap().success());
        Small(place)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0.0.path()).status();
        assert!(std::thread::panicking() || unmounted.unwrap().success());
    }
}

#[test]
fn a_disk_that_fills_up_leaves_the_guest_running() {
    testkit::require!(Qemu, Userfaultfd, Root);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 64));
    let small = Small::new(16);
    let refused = capture(&qemu, &small.0.file(), &[]);
    assert!(refused.error().contains("--any-space"), "{refused:?}");
    assert_eq!(qemu.qmp().migration().unwrap().0, "none");
    let full = capture(&qemu, &small.0.file(), &["--any-space"]);
    for word in ["vm.snap", "offset", "No space left"] {
        assert!(full.error().contains(word), "{full:?}");
    }
    assert_eq!(small.0.files(), [""; 0]);
    is_as_before(&mut qemu);
    goes_on(&mut qemu);
}

#[test]
fn a_file_that_may_not_grow_leaves_the_guest_running() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 64));
    let place = Place::new();
    // In units of 512 bytes.
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 40000; exec \"$0\" \"$@\""]).arg(testkit_qemu::fastload());
    let ended = limited.args(arguments(&qemu, &place.file(), &[])).stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("vm.snap") && stderr.contains("File too large"), "{stderr}");
    assert_eq!(place.files(), [""; 0]);
    is_as_before(&mut qemu);
    goes_on(&mut qemu);
}

#[test]
fn what_can_not_be_captured_is_refused_before_anything_changes() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 32));
    let place = Place::new();
    let refused = |qemu: &mut Qemu, words: &[&str]| {
        let before = qemu.qmp().capabilities().unwrap();
        let ended = capture(qemu, &place.file(), &["--json"]);
        for word in words {
            assert!(ended.error().contains(word), "{ended:?}");
        }
        assert_eq!((ended.stderr.lines().count(), ended.stdout.lines().count()), (1, 1), "{ended:?}");
        assert!(ended.stdout.contains("\"event\":\"error\""), "{ended:?}");
        assert_eq!(qemu.qmp().capabilities().unwrap(), before);
        assert_eq!(place.files(), [""; 0]);
    };
    for capability in ["xbzrle", "mapped-ram", "return-path", "postcopy-ram", "multifd", "x-ignore-shared"] {
        qemu.set_capabilities(&[(capability, true)]).unwrap();
        refused(&mut qemu, &[capability]);
        qemu.set_capabilities(&[(capability, false)]).unwrap();
        assert_eq!(qemu.qmp().migration().unwrap().0, "none");
    }
    qemu.execute("migrate-set-parameters", json!({"tls-creds": "some"})).unwrap();
    refused(&mut qemu, &["tls-creds"]);
    qemu.execute("migrate-set-parameters", json!({"tls-creds": ""})).unwrap();

    // A migration to somebody who never reads.
    let path = place.0.path().with_extension("socket");
    let listener = UnixListener::bind(&path).unwrap();
    qemu.execute("migrate", json!({"uri": format!("unix:{}", path.display())})).unwrap();
    let (reader, _) = listener.accept().unwrap();
    refused(&mut qemu, &["busy with a migration"]);
    qemu.execute("migrate_cancel", json!({})).unwrap();
    drop(reader);
    fs::remove_file(&path).unwrap();
    goes_on(&mut qemu);

    let ended = capture(&qemu, Path::new("/nonexistent/vm.snap"), &[]);
    assert!(ended.error().contains("/nonexistent/vm.snap"), "{ended:?}");
    for no_file in [place.0.path(), Path::new("/dev/null")] {
        let ended = capture(&qemu, no_file, &[]);
        assert!(ended.error().ends_with(&format!("{}: not a regular file", no_file.display())), "{ended:?}");
    }
    let waiting = Qemu::start(&Setup::new(Machine::Pc, 32).waiting(), &Plan::check(4 * MIB).build()).unwrap();
    let ended = capture(&waiting, &place.file(), &[]);
    assert!(ended.error().contains("inmigrate"), "{ended:?}");
    let file = File::create(place.file()).unwrap();
    let ended = Fastload::start(["capture", "--qmp", "/nonexistent", "x"]).unwrap().finish().unwrap();
    assert!(ended.error().contains("/nonexistent"), "{ended:?}");
    drop(file);
}
