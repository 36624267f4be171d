//! Exit code 0 means that the guest runs: disks that another process holds.

use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use testkit_qemu::guest::{Plan, Work};
use testkit_qemu::{Fastload, Machine, Setup};

use crate::MIB;
use crate::support::{How, Saved, settings_are_back};

/// A new qcow2 image.
fn image(dir: &Path) -> PathBuf {
    let path = dir.join("d.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("16M").status().unwrap();
    assert!(made.success());
    path
}

/// The machine with that image as its disk.
fn with_disk(setup: &Setup, image: &Path) -> Setup {
    let node = format!("driver=qcow2,node-name=d0,file.driver=file,file.filename={}", image.display());
    let extra = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=d0"].map(str::to_owned).to_vec();
    Setup { extra, ..setup.clone() }
}

/// A `qemu-io` that has the image open for writing, until it is dropped.
struct Holder(Child, Option<ChildStdin>);

impl Holder {
    fn of(image: &Path) -> Holder {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2"]).arg(image).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        // It answers when it has it.
        writeln!(input, "length").unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).bytes().map(Result::unwrap);
        assert!(said.any(|byte| byte == b'M'), "it is not open");
        Holder(child, Some(input))
    }

    fn name(&self) -> String {
        format!("process {} (qemu-io)", self.0.id())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.1.take());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Found before anything starts; loaded paused as the message says, and started when the image is free.
#[test]
fn a_disk_that_another_process_holds_is_named_before_anything_starts() {
    testkit::require!(Qemu, QemuTools, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let both = testkit::require::have(&[testkit::require::Prerequisite::OlderQemu]);
    let setup = with_disk(&Setup { version: Some("7.2"), ..Setup::new(Machine::Pc, 32) }, &image);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    for setup in [setup.clone(), setup.older()].into_iter().take(1 + usize::from(both)) {
        let holder = Holder::of(&image);
        let mut qemu = saved.waiting(&setup);
        let refused = saved.load(&qemu, &[]);
        for word in [&holder.name(), &image.display().to_string(), "--paused", "--skip-disk-check"] {
            assert!(refused.error().contains(word), "{refused:?}");
        }
        assert_eq!(qemu.qmp().run_state().unwrap(), "inmigrate");
        assert_eq!(qemu.qmp().migration().unwrap().0, "none");
        settings_are_back(&mut qemu);

        let loaded = saved.load(&qemu, &["--paused"]);
        assert!(loaded.stderr.contains(&holder.name()), "{loaded:?}");
        assert_eq!(loaded.figures()["state"], "paused");
        let resume = refused.typed("resume", &[]);
        assert!(resume.error().contains(&holder.name()), "{resume:?}");
        drop(holder);
        assert_eq!(resume.typed("resume", &[]).stdout, "running\n");
        saved.is_whole(&mut qemu);
        // Nobody else holds it: its own lock is none of another's.
        let again = Fastload::start(["resume", "--qmp", &qemu.qmp_path().display().to_string()]).unwrap();
        assert!(again.finish().unwrap().status.success());
    }
}

/// What was not found beforehand is an error as well, at once, also where the guest is served until it is told to stop.
#[test]
fn a_guest_that_qemu_could_not_start_is_no_success() {
    testkit::require!(Qemu, QemuTools, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let both = testkit::require::have(&[testkit::require::Prerequisite::OlderQemu]);
    let setup = with_disk(&Setup { version: Some("7.2"), ..Setup::new(Machine::Pc, 32) }, &image);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let holder = Holder::of(&image);
    for more in [&[] as &[&str], &["--no-background"]] {
        let mut qemu = saved.waiting(&setup);
        let ended = saved.load(&qemu, &[&["--skip-disk-check"], more].concat());
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(!ended.stdout.contains("running"), "{ended:?}");
        for word in ["could not start the guest", &holder.name(), "anew", "--paused"] {
            assert!(ended.error().contains(word), "{ended:?}");
        }
        assert_eq!(qemu.qmp().run_state().unwrap(), "inmigrate");
        // Nobody is told to recover it, and another attempt is told the same.
        assert!(!ended.error().contains("--recover"), "{ended:?}");
        if more.is_empty() {
            let again = saved.load(&qemu, &[]);
            assert!(again.error().contains("anew"), "{again:?}");
        }
    }
    if !both {
        return;
    }
    // This one leaves the guest paused, and can start it later.
    let mut qemu = saved.waiting(&setup.older());
    let ended = saved.load(&qemu, &["--skip-disk-check"]);
    assert!(ended.error().contains(&holder.name()), "{ended:?}");
    drop(holder);
    assert_eq!(ended.typed("resume", &[]).stdout, "running\n");
    saved.is_whole(&mut qemu);
}

/// A guest whose disk fails as soon as it runs, once.
#[test]
fn a_guest_that_a_failing_disk_has_stopped_is_no_success() {
    testkit::require!(Qemu, QemuTools, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let (image, rules) = (dir.path().join("d.raw"), dir.path().join("rules"));
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    std::fs::write(&rules, "[inject-error]\nevent = \"none\"\niotype = \"write\"\nerrno = \"5\"\nonce = \"on\"\n")
        .unwrap();
    let setup = Setup::new(Machine::Pc, 32);
    let drive = |file: String| {
        let extra = vec!["-drive".to_owned(), format!("if=ide,format=raw,werror=stop,rerror=stop,file={file}")];
        Setup { extra, ..setup.clone() }
    };
    let plan = Plan { work: Work::Generations, disk: true, ..Plan::check(16 * MIB) };
    let whole = drive(image.display().to_string());
    let saved = Saved::new(&whole, &plan, How { at_work: true, ..How::default() });
    let failing = drive(format!("blkdebug:{}:{}", rules.display(), image.display()));
    let mut qemu = saved.waiting(&failing);
    let ended = saved.load(&qemu, &[]);
    assert!(ended.error().contains("io-error") && ended.error().contains("a disk failed"), "{ended:?}");
    assert_eq!((ended.status.code(), qemu.qmp().run_state().unwrap().as_str()), (Some(1), "io-error"));
    settings_are_back(&mut qemu);
    assert_eq!(ended.typed("resume", &[]).stdout, "running\n");
    let (passes, errors) = qemu.order('?').unwrap();
    while qemu.order('?').unwrap().0 < passes + 2 {}
    assert_eq!((errors, qemu.order('?').unwrap().1), (0, 0));
}

/// There is nothing to start where a snapshot is still to come.
#[test]
fn a_qemu_that_waits_for_a_snapshot_has_no_guest_to_resume() {
    testkit::require!(Qemu);
    let setup = Setup::new(Machine::Pc, 32);
    let qemu = testkit_qemu::Qemu::start(&setup.waiting(), &Plan::check(4 * MIB).build()).unwrap();
    let ended = Fastload::start(["resume", "--qmp", &qemu.qmp_path().display().to_string()]).unwrap().finish().unwrap();
    assert!(ended.error().contains("waits for a snapshot"), "{ended:?}");
}
