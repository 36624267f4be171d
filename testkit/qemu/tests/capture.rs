//! `fastload capture` of real, unmodified QEMUs whose guests write while they are captured.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mapped_ram::Snapshot;
use nix::sys::signal::Signal;
use page_source::units::{PAGE_SIZE, PageCount, PageIndex};
use serde_json::{Value, json};
use tempfile::{NamedTempFile, TempDir};
use testkit_qemu::guest::{CHANGING, LOWEST, Plan, STATUS, Status, Work};
use testkit_qemu::{Ended, Fastload, Machine, MemoryBackend, Qemu, Setup};

const MIB: u64 = 1 << 20;

/// A guest that writes generation numbers through its memory, from [`LOWEST`] to the end.
fn generations(setup: &Setup) -> Plan {
    Plan { work: Work::Generations, ..Plan::check(setup.ram() - 4 * MIB) }
}

/// Such a guest at work: no page is without a number any more.
fn at_work(setup: &Setup) -> Qemu {
    let mut qemu = Qemu::start(setup, &generations(setup).build()).unwrap();
    qemu.wait_ready().unwrap();
    goes_on(&mut qemu);
    qemu
}

/// The guest is running, and its counter advances.
fn goes_on(qemu: &mut Qemu) {
    assert_eq!(qemu.qmp().run_state().unwrap(), "running");
    let (before, _) = qemu.order('?').unwrap();
    while qemu.order('?').unwrap().0 < before + 2 {}
}

/// No capability is on, and no migration runs.
fn is_as_before(qemu: &mut Qemu) {
    let capabilities = qemu.qmp().capabilities().unwrap();
    let on: Vec<&String> = capabilities.0.iter().filter(|(_, state)| **state).map(|(name, _)| name).collect();
    assert!(on.is_empty(), "{on:?} left on");
    let (migration, _) = qemu.qmp().migration().unwrap();
    assert!(["none", "completed", "failed", "cancelled"].contains(&migration.as_str()), "{migration}");
}

/// Where snapshots are written: nothing else may ever be there.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("vm.snap")
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn arguments(qemu: &Qemu, file: &Path, more: &[&str]) -> Vec<String> {
    let (qmp, file) = (qemu.qmp_path().display().to_string(), file.display().to_string());
    ["capture", "--qmp", &qmp, &file].iter().chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn capture(qemu: &Qemu, file: &Path, more: &[&str]) -> Ended {
    Fastload::start(arguments(qemu, file, more)).unwrap().finish().unwrap()
}

/// Its lines with `--json`: the freeze point, if the guest was running, and the figures.
fn figures(ended: &Ended) -> (Option<Value>, Value) {
    assert!(ended.status.success(), "{ended:?}");
    let mut lines: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let captured = lines.pop().unwrap();
    assert_eq!(captured["event"], "captured", "{ended:?}");
    let frozen = lines.pop().inspect(|line| assert_eq!(line["event"], "frozen", "{ended:?}"));
    assert!(lines.is_empty(), "{ended:?}");
    (frozen, captured)
}

/// A block of the file, zero pages included, read by nothing but the bitmap's runs and `pread`.
fn block(snapshot: &Snapshot, name: &str) -> Vec<u8> {
    let (id, ram) = snapshot.layout().find(name).unwrap();
    let mut bytes = vec![0; usize::try_from(ram.length().0).unwrap()];
    let mut page = PageIndex(0);
    while page.0 < ram.pages().0 {
        let (stored, pages) = snapshot.load_run_at(id, page, PageCount(u64::MAX)).unwrap();
        let at = usize::try_from(page.byte_offset().0).unwrap();
        let into = &mut bytes[at..at + usize::try_from(pages.to_bytes().0).unwrap()];
        if stored {
            snapshot.file().read_exact_at(into, snapshot.page_offset(id, page).unwrap().0).unwrap();
            // What is zero is a hole.
            for (i, content) in into.chunks(4096).enumerate() {
                assert!(content.iter().any(|byte| *byte != 0), "page {} is stored, and zero", page.0 + i as u64);
            }
        }
        page += pages;
    }
    bytes
}

fn word(ram: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_le_bytes(ram[at..at + 8].try_into().unwrap())
}

/// The guest's own invariant: it writes the number of the pass in ascending order, so at one instant the pages hold
/// this number up to some address, and the number before from there on.
fn is_one_instant(ram: &[u8], setup: &Setup) -> Status {
    let at = usize::try_from(STATUS).unwrap();
    let status = Status::parse(&ram[at..at + 4096]).unwrap();
    let end = generations(setup).ranges[0].1;
    let numbers: Vec<u64> = (LOWEST..end).step_by(4096).map(|at| word(ram, at)).collect();
    let boundary = numbers.partition_point(|number| *number == status.generation);
    let (new, old) = numbers.split_at(boundary);
    assert!(new.iter().all(|number| *number == status.generation));
    assert!(
        old.iter().all(|number| *number + 1 == status.generation),
        "generation {}, page {boundary}: {:?}",
        status.generation,
        &old[..old.len().min(8)]
    );
    status
}

/// A file for RAM on tmpfs, where a test can look at it.
fn visible(setup: &Setup) -> (NamedTempFile, Setup) {
    let file = tempfile::Builder::new().prefix("fastload-ram-").tempfile_in("/dev/shm").unwrap();
    let backend = MemoryBackend::File(file.path().to_owned());
    (file, Setup { backend, ..setup.clone() })
}

/// Loads the file with QEMU's own loader, paused.
fn loaded_by_qemu(setup: &Setup, file: &Path) -> Qemu {
    let setup = Setup { stopped: true, ..setup.waiting() };
    let mut qemu = Qemu::start(&setup, &generations(&setup).build()).unwrap();
    qemu.set_capabilities(&[("mapped-ram", true), ("events", true)]).unwrap();
    qemu.execute("migrate-incoming", json!({"uri": format!("file:{}", file.display())})).unwrap();
    qemu.wait_migration("completed").unwrap();
    qemu.set_capabilities(&[("mapped-ram", false), ("events", false)]).unwrap();
    qemu
}

/// Loads the file with ours, paused.
fn loaded_by_fastload(setup: &Setup, file: &Path) -> Qemu {
    let qemu = Qemu::start(&setup.waiting(), &generations(setup).build()).unwrap();
    let (file, qmp) = (file.display().to_string(), qemu.qmp_path().display().to_string());
    let ended = Fastload::start(["load", &file, "--qmp", &qmp, "--paused", "--json"]).unwrap().finish().unwrap();
    assert_eq!(ended.figures()["state"], "paused", "{ended:?}");
    qemu
}

/// Every byte of RAM is that of the file, and the guest goes on from there.
fn is_the_file(mut qemu: Qemu, memory: &NamedTempFile, ram: &[u8], status: &Status) {
    let loaded = fs::read(memory.path()).unwrap();
    assert_eq!(loaded.len(), ram.len());
    // Under KVM, QEMU itself writes into the firmware's memory while it loads its devices.
    let by_qemu = if qemu.setup().kvm { CHANGING[2] } else { (0, 0) };
    let pages = loaded.chunks(4096).zip(ram.chunks(4096)).zip((0u64..).step_by(4096));
    let mut differ = pages.filter(|((loaded, saved), at)| loaded != saved && !(by_qemu.0..by_qemu.1).contains(at));
    assert_eq!(differ.next().map(|(_, at)| at), None, "the first page that differs");
    qemu.execute("cont", json!({})).unwrap();
    goes_on(&mut qemu);
    assert!(qemu.status().unwrap().generation >= status.generation + 2);
}

/// Captures a guest at work; its file is one instant of it, and both loaders take it.
fn captured_and_loaded(setup: &Setup) {
    let mut qemu = at_work(setup);
    let place = Place::new();
    let before = qemu.status().unwrap().generation;
    let (frozen, captured) = figures(&capture(&qemu, &place.file(), &["--json"]));
    let after = qemu.status().unwrap().generation;
    is_as_before(&mut qemu);
    goes_on(&mut qemu);
    drop(qemu);

    let frozen = frozen.unwrap();
    let blackout = frozen["blackout_us"].as_u64().unwrap();
    assert!((1..10_000_000).contains(&blackout), "{frozen}");
    assert_eq!(frozen["frozen_at_us"], captured["frozen_at_us"]);
    assert_eq!(place.files(), ["vm.snap"]);
    let snapshot = Snapshot::open(place.file()).unwrap();
    assert!(snapshot.is_complete() && snapshot.warnings().is_empty(), "{:?}", snapshot.warnings());
    assert!(snapshot.configuration().capabilities().eq(["mapped-ram"]));
    assert_eq!(snapshot.diagnose().unwrap(), []);
    let ram = block(&snapshot, "pc.ram");
    let status = is_one_instant(&ram, setup);
    assert!((before..=after).contains(&status.generation), "{before} {status:?} {after}");
    let (mut stored, mut pages) = (0, 0);
    for (id, block) in snapshot.layout().iter() {
        stored += snapshot.stored_pages(id).unwrap().0;
        pages += block.pages().0;
    }
    assert_eq!(captured["stored_pages"], stored);
    assert_eq!(captured["zero_pages"], pages - stored);
    let allocated = fs::metadata(place.file()).unwrap().blocks() * 512;
    assert!(allocated <= stored * PAGE_SIZE * 102 / 100 + MIB, "{allocated} bytes for {stored} pages");

    let (memory, with_file) = visible(setup);
    is_the_file(loaded_by_qemu(&with_file, &place.file()), &memory, &ram, &status);
    if testkit::require::have(&[testkit::require::Prerequisite::Userfaultfd]) {
        let (memory, with_file) = visible(setup);
        is_the_file(loaded_by_fastload(&with_file, &place.file()), &memory, &ram, &status);
    }
}

#[test]
fn a_guest_at_work_on_pc() {
    testkit::require!(Qemu, Userfaultfd);
    captured_and_loaded(&Setup::new(Machine::Pc, 64));
}

#[test]
fn a_guest_at_work_on_q35_with_virtio_and_shared_memory() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup { virtio: true, cpus: 2, backend: MemoryBackend::Memfd, ..Setup::new(Machine::Q35, 64) };
    captured_and_loaded(&setup);
}

#[test]
fn a_guest_at_work_in_huge_pages() {
    testkit::require!(Qemu, Userfaultfd, Hugepages);
    let _pages = testkit::hugepages::Overcommit::reserve(16).unwrap();
    captured_and_loaded(&Setup { backend: MemoryBackend::HugeMemfd, ..Setup::new(Machine::Pc, 32) });
}

#[test]
fn a_guest_at_work_under_kvm() {
    testkit::require!(Qemu, Userfaultfd, Kvm);
    captured_and_loaded(&Setup { kvm: true, ..Setup::new(Machine::Pc, 16) });
}

#[test]
fn again_and_again() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 32);
    let mut qemu = at_work(&setup);
    let place = Place::new();
    let mut last = 0;
    let full = std::env::var_os("FASTLOAD_FULL").is_some_and(|full| full == "1");
    for _ in 0..if full { 100 } else { 5 } {
        figures(&capture(&qemu, &place.file(), &["--json"]));
        let status = is_one_instant(&block(&Snapshot::open(place.file()).unwrap(), "pc.ram"), &setup);
        assert!(status.generation >= last);
        last = status.generation;
        is_as_before(&mut qemu);
        goes_on(&mut qemu);
    }
}

#[test]
fn a_paused_guest_stays_paused() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 32);
    let mut qemu = at_work(&setup);
    qemu.execute("stop", json!({})).unwrap();
    qemu.set_capabilities(&[("events", true)]).unwrap();
    let place = Place::new();
    let (frozen, captured) = figures(&capture(&qemu, &place.file(), &["--json"]));
    assert_eq!((frozen, &captured["blackout_us"]), (None, &json!(null)));
    assert_eq!(qemu.qmp().run_state().unwrap(), "paused");
    // What was on stays on.
    assert!(qemu.qmp().capabilities().unwrap().0["events"]);
    let dump = qemu.dump().unwrap();
    let ram = block(&Snapshot::open(place.file()).unwrap(), "pc.ram");
    let mut page = [0; 4096];
    for at in (LOWEST..setup.ram()).step_by(4096) {
        dump.read(at, &mut page).unwrap();
        assert_eq!(page, ram[usize::try_from(at).unwrap()..][..4096], "{at:#x}");
    }
    qemu.execute("cont", json!({})).unwrap();
    goes_on(&mut qemu);
}

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
    assert!(again.stderr.contains("background-snapshot is on already"), "{again:?}");
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
fn a_qemu_without_the_right_to_userfaultfd() {
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

/// A file system of so many MiB, while this value lives.
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
        assert_eq!((ended.stderr.lines().count(), ended.stdout.as_str()), (1, ""), "{ended:?}");
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
    let ended = capture(&qemu, place.0.path(), &[]);
    assert!(ended.error().contains("directory"), "{ended:?}");
    let waiting = Qemu::start(&Setup::new(Machine::Pc, 32).waiting(), &Plan::check(4 * MIB).build()).unwrap();
    let ended = capture(&waiting, &place.file(), &[]);
    assert!(ended.error().contains("inmigrate"), "{ended:?}");
    let file = File::create(place.file()).unwrap();
    let ended = Fastload::start(["capture", "--qmp", "/nonexistent", "x"]).unwrap().finish().unwrap();
    assert!(ended.error().contains("/nonexistent"), "{ended:?}");
    drop(file);
}
