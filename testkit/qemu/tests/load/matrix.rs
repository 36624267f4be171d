//! Machines, memory, ways of saving: the guest goes on, and every byte of its RAM is there.

use std::collections::HashSet;

use testkit_qemu::guest::Plan;
use testkit_qemu::{Machine, MemoryBackend, Setup};

use crate::MIB;
use crate::support::{How, Saved, full};

fn machine(machine: Machine, megabytes: u64) -> Setup {
    let many = machine == Machine::Q35;
    let (cpus, virtio) = if many { (2, true) } else { (1, false) };
    Setup { cpus, virtio, ..Setup::new(machine, megabytes) }
}

fn plan(setup: &Setup) -> Plan {
    Plan { cpus: setup.cpus, ..Plan::check(setup.ram() - 4 * MIB) }
}

/// What guest RAM is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Backend {
    Anonymous,
    Memfd,
    /// A file on tmpfs.
    File,
}

/// How QEMU saved it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Save {
    Plain,
    Multifd,
    DirectIo,
}

/// One way of all.
#[derive(Clone, Copy, Debug)]
struct Run {
    machine: Machine,
    backend: Backend,
    save: Save,
    megabytes: u64,
    preempt: bool,
    at_work: bool,
}

const MACHINES: [Machine; 3] = [Machine::Pc, Machine::Q35, Machine::Microvm];
const BACKENDS: [Backend; 3] = [Backend::Anonymous, Backend::Memfd, Backend::File];
const SAVES: [Save; 3] = [Save::Plain, Save::Multifd, Save::DirectIo];
const SIZES: [u64; 2] = [64, 1024];
const PREEMPT: bool = true;
const AT_WORK: bool = true;

impl Run {
    /// Saves a guest.
    fn saved(&self) -> Saved {
        let setup = machine(self.machine, self.megabytes);
        let plan = if self.megabytes == 64 {
            plan(&setup)
        } else {
            // Some of it at the end, and most of it zero, so that it does not take long.
            let last = setup.ram() - 4 * MIB;
            let ranges = vec![(2 * MIB, 66 * MIB), (last - 48 * MIB, last)];
            Plan { ranges, cpus: setup.cpus, step: 512, ..Plan::check(66 * MIB) }
        };
        let (multifd, direct_io) = (self.save != Save::Plain, self.save == Save::DirectIo);
        Saved::new(&setup, &plan, How { multifd, direct_io, at_work: self.at_work })
    }

    /// Loads it, and compares.
    fn loads(&self, saved: &Saved) {
        let file = tempfile::Builder::new().prefix("fastload-ram-").tempfile_in("/dev/shm").unwrap();
        let backend = match self.backend {
            Backend::Anonymous => MemoryBackend::Anonymous,
            Backend::Memfd => MemoryBackend::Memfd,
            Backend::File => MemoryBackend::File(file.path().to_owned()),
        };
        let more: &[&str] = if self.preempt { &["--preempt"] } else { &[] };
        let figures = saved.loads_into(&Setup { backend, ..saved.setup.clone() }, more);
        assert_eq!(figures["preempt"], self.preempt, "{figures}");
        // Zero pages were not sent.
        assert!(figures["sent_bytes"].as_u64().unwrap() < 130 * MIB, "{figures}");
        if !self.at_work {
            // A guest that stands still asks for little: the background brought the rest.
            let background = figures["background_pages"].as_u64().unwrap();
            assert!(background * 4096 > 40 * MIB, "{figures}");
        }
    }

    /// All pairs of an axis and its value with another.
    fn pairs(&self) -> Vec<[(usize, String); 2]> {
        let Run { machine, backend, save, megabytes, preempt, at_work } = self;
        let texts: [String; 6] = [
            format!("{machine:?}"),
            format!("{backend:?}"),
            format!("{save:?}"),
            format!("{megabytes}"),
            format!("{preempt}"),
            format!("{at_work}"),
        ];
        let all: Vec<(usize, String)> = texts.into_iter().enumerate().collect();
        let ordered = all.iter().flat_map(|a| all.iter().map(move |b| [a.clone(), b.clone()]));
        ordered.filter(|[a, b]| a.0 < b.0).collect()
    }
}

/// Every combination.
fn every() -> impl Iterator<Item = Run> {
    let both = [false, true];
    let guests = MACHINES.into_iter().flat_map(move |machine| SIZES.map(|megabytes| (machine, megabytes)));
    let saves = guests.flat_map(|guest| SAVES.map(|save| (guest, save)));
    let saved = saves.flat_map(move |(guest, save)| both.map(|at_work| (guest, save, at_work)));
    let ways = saved.flat_map(|saved| BACKENDS.map(|backend| (saved, backend)));
    ways.flat_map(move |(((machine, megabytes), save, at_work), backend)| {
        both.map(|preempt| Run { machine, backend, save, megabytes, preempt, at_work })
    })
}

/// The list of the runs that are always made, and a test for each.
macro_rules! runs {
    ($($name:ident: $machine:ident $backend:ident $save:ident $megabytes:literal $preempt:expr, $at_work:expr;)*) => {
        const DEFAULT: &[Run] = &[$(Run {
            machine: Machine::$machine,
            backend: Backend::$backend,
            save: Save::$save,
            megabytes: $megabytes,
            preempt: $preempt,
            at_work: $at_work,
        }),*];

        /// In the order of the list.
        #[derive(Clone, Copy)]
        #[expect(non_camel_case_types, reason = "they are the names of the tests")]
        enum Index { $($name),* }

        $(#[test]
        fn $name() {
            testkit::require!(Qemu, Userfaultfd);
            let run = &DEFAULT[Index::$name as usize];
            run.loads(&run.saved());
        })*
    };
}

runs! {
    pc_anonymous: Pc Anonymous Plain 64 !PREEMPT, !AT_WORK;
    pc_file_multifd: Pc File Multifd 64 PREEMPT, AT_WORK;
    pc_file_direct_io: Pc File DirectIo 64 PREEMPT, !AT_WORK;
    pc_memfd_direct_io_one_gibibyte: Pc Memfd DirectIo 1024 PREEMPT, AT_WORK;
    pc_anonymous_multifd_one_gibibyte: Pc Anonymous Multifd 1024 !PREEMPT, !AT_WORK;
    q35_memfd_direct_io: Q35 Memfd DirectIo 64 !PREEMPT, !AT_WORK;
    q35_anonymous: Q35 Anonymous Plain 64 PREEMPT, AT_WORK;
    q35_memfd_one_gibibyte: Q35 Memfd Plain 1024 !PREEMPT, !AT_WORK;
    q35_file_multifd_one_gibibyte: Q35 File Multifd 1024 PREEMPT, !AT_WORK;
    microvm_file: Microvm File Plain 64 !PREEMPT, !AT_WORK;
    microvm_memfd_multifd: Microvm Memfd Multifd 64 !PREEMPT, AT_WORK;
    microvm_anonymous_direct_io_one_gibibyte: Microvm Anonymous DirectIo 1024 PREEMPT, AT_WORK;
}

#[test]
fn each_pair_of_two_things_is_run_by_default() {
    let made: HashSet<_> = DEFAULT.iter().flat_map(Run::pairs).collect();
    let all: HashSet<_> = every().flat_map(|run| run.pairs()).collect();
    assert_eq!(all.len(), 3 * 9 + 9 * 6 + 3 * 4, "axes of 3, 3, 3, 2, 2 and 2 values");
    let missing: Vec<_> = all.difference(&made).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// RAM of a device, which the guest's firmware has written into.
#[test]
fn video_memory_is_loaded() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup { extra: vec!["-vga".into(), "std".into()], ..machine(Machine::Pc, 64) };
    let saved = Saved::new(&setup, &plan(&setup), How::default());
    let text = saved.ram.block("vga.vram").unwrap();
    assert!(text.len() == 16 << 20 && text.iter().any(|byte| *byte != 0), "the firmware has shown nothing");
    assert!(saved.ram.block("vga.rom").is_some());
    for more in [&[] as &[&str], &["--preempt"]] {
        saved.loads_into(&setup, more);
    }
}

#[test]
fn memory_above_four_gibibytes_is_loaded() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = machine(Machine::Pc, 4096);
    let high = 1 << 32;
    // On both sides of the hole below 4 GiB, and at both ends: all is compared, but a third of a GiB is stored.
    let ranges = vec![
        (2 * MIB, 130 * MIB),
        (3000 * MIB, 3064 * MIB),
        (high, high + 128 * MIB),
        (high + 960 * MIB, high + 1020 * MIB),
    ];
    let plan = Plan { ranges, step: 512, ..Plan::check(96 * MIB) };
    let saved = Saved::new(&setup, &plan, How::default());
    let figures = saved.loads_into(&setup, &[]);
    let sent = figures["sent_bytes"].as_u64().unwrap();
    assert!((200 * MIB..400 * MIB).contains(&sent), "{figures}");
}

#[test]
fn a_guest_under_kvm_is_loaded() {
    testkit::require!(Qemu, Userfaultfd, Kvm);
    for machine_type in [Machine::Pc, Machine::Microvm] {
        let setup = Setup { kvm: true, ..machine(machine_type, 64) };
        // Its code is emulated on some machines: little to check, but memory for the background.
        let saved =
            Saved::new(&setup, &Plan { step: 2048, ..Plan::check(12 * MIB) }, How { at_work: true, ..How::default() });
        saved.loads_into(&setup, &[]);
    }
}

#[test]
fn huge_pages_are_loaded() {
    testkit::require!(Qemu, Userfaultfd, Hugepages);
    let setup = machine(Machine::Pc, 64);
    let saved = Saved::new(&setup, &plan(&setup), How::default());
    let _pages = testkit::hugepages::Overcommit::reserve(32).unwrap();
    let figures = saved.loads_into(&Setup { backend: MemoryBackend::HugeMemfd, ..setup }, &[]);
    // Zero pages go along inside of huge pages.
    assert!(figures["zero_pages"].as_u64().unwrap() > 1000, "{figures}");
}

/// Every combination on one machine, of one size.
fn full_matrix(machine: Machine, megabytes: u64) {
    // A snapshot serves for all ways to load it, which `every` has one after the other.
    let mut last: Option<(String, Saved)> = None;
    for run in every().filter(|run| (run.machine, run.megabytes) == (machine, megabytes)) {
        eprintln!("{run:?}");
        let key = format!("{:?} {}", run.save, run.at_work);
        let kept = last.take().filter(|(kept, _)| *kept == key);
        let (_, saved) = last.insert(kept.unwrap_or_else(|| (key, run.saved())));
        run.loads(saved);
    }
}

macro_rules! full_matrix {
    ($($name:ident: $machine:ident $megabytes:literal;)*) => {
        $(#[test]
        fn $name() {
            testkit::require!(Qemu, Userfaultfd);
            if full() {
                full_matrix(Machine::$machine, $megabytes);
            }
        })*
    };
}

full_matrix! {
    full_matrix_pc: Pc 64;
    full_matrix_pc_one_gibibyte: Pc 1024;
    full_matrix_q35: Q35 64;
    full_matrix_q35_one_gibibyte: Q35 1024;
    full_matrix_microvm: Microvm 64;
    full_matrix_microvm_one_gibibyte: Microvm 1024;
}

#[test]
fn full_matrix_four_gibibytes() {
    testkit::require!(Qemu, Userfaultfd);
    if !full() {
        return;
    }
    for machine_type in [Machine::Pc, Machine::Q35] {
        let setup = machine(machine_type, 4096);
        let high = ((1u64 << 32), (1u64 << 32) + 512 * MIB);
        let ranges = vec![(2 * MIB, 1500 * MIB), high];
        let plan = Plan { ranges, cpus: setup.cpus, step: 4096, ..Plan::check(96 * MIB) };
        Saved::new(&setup, &plan, How { multifd: true, ..How::default() }).loads_into(&setup, &["--preempt"]);
    }
}
