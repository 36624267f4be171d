//! Saving a guest, loading it again, and comparing the two.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit_qemu::guest::{CHANGING, Plan};
use testkit_qemu::{Ended, Fastload, Qemu, RamDump, Setup, first_difference, first_hidden_difference};

/// A snapshot, and what it is to be compared with.
pub(crate) struct Saved {
    pub(crate) setup: Setup,
    pub(crate) file: PathBuf,
    /// All RAM of the guest that was saved, as its own QEMU shows it.
    pub(crate) ram: RamDump,
    pub(crate) passes: u64,
    /// Whether the guest stood still.
    pub(crate) still: bool,
    /// Whether it writes to memory even so.
    ticks: bool,
    /// Holds the file, and the QEMU that holds the dump.
    _dir: TempDir,
}

/// How to save.
#[derive(Clone, Copy, Default)]
pub(crate) struct How {
    pub(crate) multifd: bool,
    pub(crate) direct_io: bool,
    /// While the guest is working, instead of standing still.
    pub(crate) at_work: bool,
}

impl Saved {
    pub(crate) fn new(setup: &Setup, plan: &Plan, how: How) -> Saved {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("snapshot");
        let mut qemu = Qemu::start(setup, &plan.build()).unwrap();
        qemu.wait_ready().unwrap();
        let (mut passes, errors) = qemu.order(if how.at_work { '?' } else { 's' }).unwrap();
        assert_eq!(errors, 0);
        qemu.save(&file, how.multifd, how.direct_io).unwrap();
        let ram = qemu.dump().unwrap();
        if how.at_work {
            passes = qemu.status().unwrap().passes[0];
        }
        Saved { setup: setup.clone(), file, ram, passes, still: !how.at_work, ticks: plan.ticks.is_some(), _dir: dir }
    }

    /// A snapshot of a guest that stood still, saved in some other way.
    pub(crate) fn of(setup: &Setup, file: PathBuf, ram: RamDump, passes: u64, dir: TempDir) -> Saved {
        Saved { setup: setup.clone(), file, ram, passes, still: true, ticks: false, _dir: dir }
    }

    /// A QEMU that waits for it. (The guest's ELF file is not needed; QEMU wants one to make the same option ROMs.)
    pub(crate) fn waiting(&self, setup: &Setup) -> Qemu {
        Qemu::start(&setup.waiting(), &Plan::check(4 << 20).build()).unwrap()
    }

    /// The arguments of `fastload load`.
    pub(crate) fn load_arguments(&self, qemu: &Qemu, more: &[&str]) -> Vec<String> {
        load_arguments(&self.file, qemu, more)
    }

    pub(crate) fn load(&self, qemu: &Qemu, more: &[&str]) -> Ended {
        Fastload::start(self.load_arguments(qemu, more)).unwrap().finish().unwrap()
    }

    /// Loads it into a QEMU, and the guest goes on where it stopped, with all its memory.
    pub(crate) fn loads_into(&self, setup: &Setup, more: &[&str]) -> Value {
        let mut qemu = self.waiting(setup);
        let figures = self.load(&qemu, more).figures();
        assert_eq!(figures["state"], "running", "{figures}");
        assert!(figures["running_us"].as_u64() <= figures["complete_us"].as_u64(), "{figures}");
        self.is_whole(&mut qemu);
        figures
    }

    /// The RAM is that of the snapshot, and the guest goes on.
    pub(crate) fn is_whole(&self, qemu: &mut Qemu) {
        let loaded = qemu.dump().unwrap();
        let changing: &[(u64, u64)] = match (self.still && !self.ticks, self.setup.kvm) {
            (true, false) => &[],
            (true, true) => &CHANGING[2..],
            (false, false) => &CHANGING[..2],
            (false, true) => &CHANGING,
        };
        assert_eq!(first_difference(&self.ram, &loaded, changing).unwrap(), None, "the first byte that differs");
        // Under KVM the firmware writes into its own ROM.
        let firmware: &[&str] = if self.setup.kvm { &["bios"] } else { &[] };
        assert_eq!(first_hidden_difference(&self.ram, &loaded, changing, firmware), None);
        settings_are_back(qemu);
        qemu.execute("cont", json!({})).unwrap();
        if self.still {
            assert_eq!(qemu.order('g').unwrap(), (self.passes, 0));
        }
        let (passes, errors) = qemu.order('?').unwrap();
        assert!(passes >= self.passes && errors == 0, "{passes} {errors}");
        while qemu.order('?').unwrap().0 < passes + 2 {}
        assert_eq!(qemu.order('?').unwrap().1, 0);
    }
}

pub(crate) fn load_arguments(file: &Path, qemu: &Qemu, more: &[&str]) -> Vec<String> {
    let mut arguments = vec!["load".to_owned(), file.display().to_string()];
    arguments.extend(["--qmp".to_owned(), qemu.qmp_path().display().to_string(), "--json".to_owned()]);
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    arguments
}

/// No capability is left on.
pub(crate) fn settings_are_back(qemu: &mut Qemu) {
    let capabilities = qemu.qmp().capabilities().unwrap();
    let on: Vec<&String> = capabilities.0.iter().filter(|(_, state)| **state).map(|(name, _)| name).collect();
    assert!(on.is_empty(), "{on:?} left on");
}

/// The long matrices are run too.
pub(crate) fn full() -> bool {
    std::env::var_os("FASTLOAD_FULL").is_some_and(|full| full == "1")
}
