//! Captures that succeed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use mapped_ram::Snapshot;
use page_units::PAGE_SIZE;
use serde_json::json;
use tempfile::NamedTempFile;
use testkit_qemu::guest::{CHANGING, LOWEST, Status};
use testkit_qemu::{Fastload, Machine, MemoryBackend, Qemu, Setup};

use crate::support::{
    MIB, Place, at_work, block, capture, figures, generations, goes_on, is_as_before, is_one_instant,
};

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
fn a_guest_is_captured_several_times() {
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
