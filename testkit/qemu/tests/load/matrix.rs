//! Machines, memory, ways of saving: the guest goes on, and every byte of its RAM is there.

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

fn how(multifd: bool, direct_io: bool, at_work: bool) -> How {
    How { multifd, direct_io, at_work }
}

/// A file for RAM on tmpfs.
fn shared_memory() -> tempfile::NamedTempFile {
    tempfile::Builder::new().prefix("fastload-ram-").tempfile_in("/dev/shm").unwrap()
}

fn loads(machine_type: Machine, saving: How, backends: &[&str], preempt: bool) {
    let setup = machine(machine_type, 64);
    let saved = Saved::new(&setup, &plan(&setup), saving);
    for backend in backends {
        let file = shared_memory();
        let backend = match *backend {
            "memfd" => MemoryBackend::Memfd,
            "file" => MemoryBackend::File(file.path().to_owned()),
            _ => MemoryBackend::Anonymous,
        };
        let more: &[&str] = if preempt { &["--preempt"] } else { &[] };
        let figures = saved.loads_into(&Setup { backend, ..setup.clone() }, more);
        assert_eq!(figures["preempt"], preempt, "{figures}");
        if saving.at_work {
            continue;
        }
        // A guest that stands still asks for little: the background brought the rest.
        let background = figures["background_pages"].as_u64().unwrap();
        assert!(background * 4096 > 40 * MIB, "{figures}");
    }
}

#[test]
fn pc_into_anonymous_memory() {
    testkit::require!(Qemu, Userfaultfd);
    loads(Machine::Pc, how(false, false, false), &["anonymous"], false);
}

#[test]
fn pc_at_work_saved_by_multifd_into_a_file_on_tmpfs_with_preempt() {
    testkit::require!(Qemu, Userfaultfd);
    loads(Machine::Pc, how(true, false, true), &["file"], true);
}

#[test]
fn q35_with_virtio_saved_with_direct_io_into_memfd() {
    testkit::require!(Qemu, Userfaultfd);
    loads(Machine::Q35, how(true, true, false), &["memfd"], false);
}

#[test]
fn q35_with_virtio_and_both_processors_at_work_with_preempt() {
    testkit::require!(Qemu, Userfaultfd);
    loads(Machine::Q35, how(false, false, true), &["anonymous"], true);
}

#[test]
fn microvm_into_a_file_on_tmpfs() {
    testkit::require!(Qemu, Userfaultfd);
    loads(Machine::Microvm, how(false, false, false), &["file"], false);
}

#[test]
fn microvm_at_work_saved_by_multifd_into_memfd() {
    testkit::require!(Qemu, Userfaultfd);
    loads(Machine::Microvm, how(true, false, true), &["memfd"], false);
}

#[test]
fn one_gibibyte() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = machine(Machine::Q35, 1024);
    // Some of it at the end, and most of it zero, so that it does not take long.
    let ranges = vec![(2 * MIB, 96 * MIB), (900 * MIB, 1000 * MIB)];
    let plan = Plan { ranges, cpus: 2, step: 512, ..Plan::check(96 * MIB) };
    let saved = Saved::new(&setup, &plan, How::default());
    let figures = saved.loads_into(&Setup { backend: MemoryBackend::Memfd, ..setup }, &[]);
    // Zero pages were not sent.
    assert!(figures["sent_bytes"].as_u64().unwrap() < 220 * MIB, "{figures}");
}

#[test]
fn four_gibibytes() {
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
fn under_kvm() {
    testkit::require!(Qemu, Userfaultfd, Kvm);
    for machine_type in [Machine::Pc, Machine::Microvm] {
        let setup = Setup { kvm: true, ..machine(machine_type, 64) };
        // Its code is emulated on some machines: little to check, but memory for the background.
        let saved = Saved::new(&setup, &Plan { step: 2048, ..Plan::check(12 * MIB) }, how(false, false, true));
        saved.loads_into(&setup, &[]);
    }
}

#[test]
fn huge_pages() {
    testkit::require!(Qemu, Userfaultfd, Hugepages);
    let setup = machine(Machine::Pc, 64);
    let saved = Saved::new(&setup, &plan(&setup), How::default());
    let _pages = testkit::hugepages::Overcommit::reserve(32).unwrap();
    let figures = saved.loads_into(&Setup { backend: MemoryBackend::HugeMemfd, ..setup }, &[]);
    // Zero pages go along inside of huge pages.
    assert!(figures["zero_pages"].as_u64().unwrap() > 1000, "{figures}");
}

#[test]
fn the_full_matrix() {
    testkit::require!(Qemu, Userfaultfd);
    if !full() {
        return;
    }
    for machine_type in [Machine::Pc, Machine::Q35, Machine::Microvm] {
        for (multifd, direct_io) in [(false, false), (true, false), (true, true)] {
            for (preempt, at_work) in [(false, false), (true, false), (false, true), (true, true)] {
                loads(machine_type, how(multifd, direct_io, at_work), &["anonymous", "memfd", "file"], preempt);
            }
        }
    }
    for machine_type in [Machine::Pc, Machine::Q35] {
        let setup = machine(machine_type, 4096);
        let high = ((1u64 << 32), (1u64 << 32) + 512 * MIB);
        let ranges = vec![(2 * MIB, 1500 * MIB), high];
        let plan = Plan { ranges, cpus: setup.cpus, step: 4096, ..Plan::check(96 * MIB) };
        Saved::new(&setup, &plan, how(true, false, false)).loads_into(&setup, &["--preempt"]);
    }
}
