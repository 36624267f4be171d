//! Guests at work, captures, and what is in the files.

use std::fs;
use std::path::{Path, PathBuf};

use mapped_ram::Snapshot;
use page_units::{PageCount, PageIndex};
use serde_json::Value;
use tempfile::TempDir;
use testkit_qemu::guest::{LOWEST, Plan, STATUS, Status, Work};
use testkit_qemu::{Ended, Fastload, Qemu, Setup};

pub(crate) const MIB: u64 = 1 << 20;

/// A guest that writes generation numbers through its memory, from [`LOWEST`] to the end.
pub(crate) fn generations(setup: &Setup) -> Plan {
    Plan { work: Work::Generations, ..Plan::check(setup.ram() - 4 * MIB) }
}

/// Such a guest at work: no page is without a number any more.
pub(crate) fn at_work(setup: &Setup) -> Qemu {
    let mut qemu = Qemu::start(setup, &generations(setup).build()).unwrap();
    qemu.wait_ready().unwrap();
    goes_on(&mut qemu);
    qemu
}

/// The guest is running, and its counter advances.
pub(crate) fn goes_on(qemu: &mut Qemu) {
    assert_eq!(qemu.qmp().run_state().unwrap(), "running");
    let (before, _) = qemu.order('?').unwrap();
    while qemu.order('?').unwrap().0 < before + 2 {}
}

/// No capability is on, and no migration runs.
pub(crate) fn is_as_before(qemu: &mut Qemu) {
    let capabilities = qemu.qmp().capabilities().unwrap();
    let on: Vec<&String> = capabilities.0.iter().filter(|(_, state)| **state).map(|(name, _)| name).collect();
    assert!(on.is_empty(), "{on:?} left on");
    let (migration, _) = qemu.qmp().migration().unwrap();
    assert!(["none", "completed", "failed", "cancelled"].contains(&migration.as_str()), "{migration}");
}

/// Where snapshots are written: nothing else may ever be there.
pub(crate) struct Place(pub(crate) TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.path().join("vm.snap")
    }

    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

pub(crate) fn arguments(qemu: &Qemu, file: &Path, more: &[&str]) -> Vec<String> {
    let (qmp, file) = (qemu.qmp_path().display().to_string(), file.display().to_string());
    ["capture", "--qmp", &qmp, &file].iter().chain(more).map(|argument| (*argument).to_owned()).collect()
}

pub(crate) fn capture(qemu: &Qemu, file: &Path, more: &[&str]) -> Ended {
    Fastload::start(arguments(qemu, file, more)).unwrap().finish().unwrap()
}

/// Its lines with `--json`: the freeze point, if the guest was running, and the figures.
pub(crate) fn figures(ended: &Ended) -> (Option<Value>, Value) {
    assert!(ended.status.success(), "{ended:?}");
    let mut lines: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    lines.retain(|line| line["event"] != "progress");
    let captured = lines.pop().unwrap();
    assert_eq!(captured["event"], "complete", "{ended:?}");
    let frozen = lines.pop().inspect(|line| assert_eq!(line["event"], "frozen", "{ended:?}"));
    assert!(lines.is_empty(), "{ended:?}");
    (frozen, captured)
}

/// A block of the file, zero pages included, read by nothing but the bitmap's runs and `pread`.
pub(crate) fn block(snapshot: &Snapshot, name: &str) -> Vec<u8> {
    let (id, ram) = snapshot.layout().find(name).unwrap();
    let mut bytes = vec![0; usize::try_from(ram.length().0).unwrap()];
    let mut page = PageIndex(0);
    while page.0 < ram.pages().0 {
        let found = snapshot.load_run(id, page, PageCount(u64::MAX)).unwrap();
        let pages = found.pages();
        let at = usize::try_from(page.byte_offset().0).unwrap();
        let into = &mut bytes[at..at + usize::try_from(pages.to_bytes().0).unwrap()];
        if found.is_stored() {
            snapshot.read_exact_at(into, snapshot.page_offset(id, page).unwrap()).unwrap();
            // What is zero is a hole.
            for (i, content) in into.chunks(4096).enumerate() {
                assert!(content.iter().any(|byte| *byte != 0), "page {} is stored, and zero", page.0 + i as u64);
            }
        }
        page += pages;
    }
    bytes
}

pub(crate) fn word(ram: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_le_bytes(ram[at..at + 8].try_into().unwrap())
}

/// The guest's own invariant: it writes the number of the pass in ascending order, so at one instant the pages hold
/// this number up to some address, and the number before from there on.
pub(crate) fn is_one_instant(ram: &[u8], setup: &Setup) -> Status {
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
