//! What does not fit is refused before anything starts, with a message that says what to do.

use testkit_qemu::guest::Plan;
use testkit_qemu::{Machine, MemoryBackend, Qemu, Setup};

use crate::MIB;
use crate::support::{How, Saved, settings_are_back};

/// The error names what is wrong, and the QEMU is as it was.
pub(crate) fn refused(saved: &Saved, setup: &Setup, words: &[&str]) {
    refused_with(saved, setup, &[], words);
}

/// The same with more arguments of `fastload load`.
pub(crate) fn refused_with(saved: &Saved, setup: &Setup, more: &[&str], words: &[&str]) {
    let mut qemu = saved.waiting(setup);
    let ended = saved.load(&qemu, more);
    let error = ended.error();
    for word in words {
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert_eq!(qemu.qmp().run_state().unwrap(), "inmigrate");
    assert_eq!(qemu.qmp().migration().unwrap().0, "none");
    settings_are_back(&mut qemu);
}

#[test]
fn another_machine_is_refused() {
    testkit::require!(Qemu);
    let setup = Setup { virtio: true, cpus: 2, ..Setup::new(Machine::Q35, 64) };
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    refused(&saved, &Setup::new(Machine::Pc, 64), &["pc-q35-", "pc-i440fx-", "-machine"]);
    refused(&saved, &Setup { megabytes: 128, ..setup.clone() }, &["pc.ram", "64.00 MiB", "128.00 MiB", "-m"]);
    refused(&saved, &Setup { megabytes: 48, ..setup.clone() }, &["pc.ram", "48.00 MiB"]);
    refused(&saved, &Setup { virtio: false, ..setup.clone() }, &["0000:00:01.0", "missing"]);
    refused(&saved, &Setup { cpus: 1, ..setup.clone() }, &["2 processors", "-smp 2"]);
    let more = Setup { extra: vec!["-device".into(), "e1000".into()], ..setup.clone() };
    refused(&saved, &more, &["e1000.rom", "device too many"]);
    let another = "memory-backend-ram,id=other,size=64M";
    let extra = ["-object", another, "-machine", "q35,memory-backend=other"].map(str::to_owned).to_vec();
    refused(&saved, &Setup { extra, ..setup }, &["pc.ram", "other"]);
}

#[test]
fn a_qemu_that_does_not_wait() {
    testkit::require!(Qemu);
    let setup = Setup::new(Machine::Pc, 64);
    let plan = Plan::check(16 * MIB);
    let saved = Saved::new(&setup, &plan, How::default());
    let qemu = Qemu::start(&setup, &plan.build()).unwrap();
    let ended = saved.load(&qemu, &[]);
    assert!(ended.error().contains("-incoming defer"), "{ended:?}");
    let ended = saved.load(&qemu, &["--recover"]);
    assert!(ended.error().contains("nothing to recover"), "{ended:?}");
    // One that was told to listen, by a load that was killed before it connected.
    let mut qemu = saved.waiting(&setup);
    let uri = format!("unix:{}", qemu.dir().join("in").display());
    qemu.execute("migrate-incoming", serde_json::json!({"uri": uri})).unwrap();
    let ended = saved.load(&qemu, &[]);
    assert!(ended.error().contains("already") && ended.error().contains("anew"), "{ended:?}");
    assert!(!ended.error().contains("serve"), "it would not take it: {ended:?}");
    // One that takes what it is told to be fed.
    for preempt in [false, true] {
        let mut qemu = saved.waiting(&setup);
        qemu.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt)]).unwrap();
        let uri = format!("unix:{}", qemu.dir().join("in").display());
        qemu.execute("migrate-incoming", serde_json::json!({"uri": uri})).unwrap();
        let ended = saved.load(&qemu, &[]);
        assert!(ended.error().contains("already"), "{ended:?}");
        assert!(ended.typed("serve", &[]).status.success(), "{ended:?}");
        qemu.set_capabilities(&[("postcopy-ram", false), ("postcopy-preempt", false)]).unwrap();
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn a_qemu_without_the_right_to_userfaultfd_is_refused_by_name() {
    testkit::require!(Qemu, Root);
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let nobody = Setup { user: Some(65534), ..setup };
    if allowed.trim() == "1" {
        return saved.is_whole(&mut {
            let qemu = saved.waiting(&nobody);
            assert!(saved.load(&qemu, &[]).status.success());
            qemu
        });
    }
    refused(&saved, &nobody, &["/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1"]);
}

/// QEMU says itself why, and no right of its would help.
#[test]
fn memory_in_a_file_on_a_disk_gets_qemus_own_reason() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 32);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let on_disk = Setup { backend: MemoryBackend::File(file.path().to_owned()), ..setup };
    let mut qemu = saved.waiting(&on_disk);
    let ended = saved.load(&qemu, &[]);
    let error = ended.error();
    assert!(error.to_lowercase().contains("tmpfs") && !error.contains("CAP_SYS_PTRACE"), "{error}");
    settings_are_back(&mut qemu);
}

#[test]
fn files_that_are_no_snapshots() {
    testkit::require!(Qemu);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let whole = std::fs::metadata(&saved.file).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&saved.file).unwrap();
    file.set_len(whole / 2).unwrap();
    refused(&saved, &setup, &[]);
    file.set_len(0).unwrap();
    refused(&saved, &setup, &[]);
}
