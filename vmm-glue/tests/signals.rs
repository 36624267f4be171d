//! No thread of ours brings the VMM down by a signal: a limit on the length of files, wherever it strikes, and memory that
//! can't be read are errors.
//!
//! Each test runs in a process of its own, where the signal would do what it does by default.

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use common::Signals;
use common::live::{self, Kind};
use kvm_ioctls::Kvm;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use page_units::GuestAddr;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use testkit::require;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_glue::{
    Backing, GuestRam, Host, LiveOptions, MachineConfig, NewVm, RamSpec, SaveOptions, VcpuOptions, Vcpus, snapshot_live,
};

/// Starts this program again with a role, the signals as the shell's `trap` says.
fn child(role: &str, trap: &str, path: &Path) {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{trap}; exec \"$0\" \"$@\"")]).arg(std::env::current_exe().unwrap());
    shell.args(["--exact", "victim", "--nocapture"]).env("SIGNALS_ROLE", role).env("SIGNALS_PATH", path);
    let output = shell.env("FASTLOAD_SEED", testkit::seed::seed().to_string()).output().unwrap();
    assert!(
        output.status.success(),
        "{role}, {trap}: {:?}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn a_limit_on_the_length_of_files_is_an_error_wherever_it_strikes() {
    require!(Kvm, Userfaultfd);
    for trap in ["trap - XFSZ", "trap '' XFSZ"] {
        let dir = tempfile::tempdir().unwrap();
        child("limits", trap, &dir.path().join("guest.mr"));
        assert_eq!(live::names(dir.path()), ["guest.mr"], "the last one, which nothing limited");
    }
}

#[test]
fn memory_whose_file_is_cut_off_is_an_error() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    child("cut off", "trap - BUS", &dir.path().join("guest.mr"));
    assert_eq!(live::names(dir.path()), ["guest.mr"]);
}

/// Does nothing by itself: the tests above start this program again with a role for it.
#[test]
fn victim() {
    let Ok(role) = std::env::var("SIGNALS_ROLE") else { return };
    let path = PathBuf::from(std::env::var_os("SIGNALS_PATH").unwrap());
    match role.as_str() {
        "limits" => limits(&path),
        "cut off" => cut_off(&path),
        other => panic!("{other}"),
    }
}

/// The signals of a thread: blocked and pending.
fn signals() -> Vec<String> {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let lines = status.lines().filter(|line| ["SigPnd", "ShdPnd", "SigBlk"].iter().any(|name| line.starts_with(name)));
    lines.map(str::to_owned).collect()
}

/// The ways to a file.
const WAYS: [&str; 3] = ["saved", "saved by three threads", "saved live"];

fn write(way: &str, vcpus: &Vcpus, host: &Host, path: &Path) -> Result<(), String> {
    let threads = if way == WAYS[1] { 3 } else { 1 };
    let options = SaveOptions::default().with_threads(threads);
    match way == WAYS[2] {
        true => {
            let live = snapshot_live(vcpus, host, path, &LiveOptions::default()).map_err(|error| error.to_string())?;
            live.wait().map(drop).map_err(|error| error.to_string())
        }
        false => vmm_glue::save(vcpus, host, path, &options).map(drop).map_err(|error| error.to_string()),
    }
}

fn limits(path: &Path) {
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let (vcpus, image, bus) = live::running(&Kind::SMALL);
    write(WAYS[0], &vcpus, &host, path).unwrap();
    let length = std::fs::metadata(path).unwrap().len();
    let state = mapped_ram::Snapshot::open(path).unwrap().device_state().start.0;
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    // The headers, the pages, their very end, the device state, and anywhere.
    let mut limits = vec![0, 1, 4096, state - 4096, state - 1, state, state + 1, length - 1];
    limits.extend((0..12).map(|_| random.random_range(0..length)));
    let before = signals();
    for limit in limits {
        for way in WAYS {
            std::fs::remove_file(path).unwrap_or(());
            if way == WAYS[2] {
                vcpus.resume();
            }
            setrlimit(Resource::RLIMIT_FSIZE, limit, RLIM_INFINITY).unwrap();
            let error = write(way, &vcpus, &host, path).expect_err("it does not fit");
            setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY).unwrap();
            assert!(error.contains("File too large"), "{way}, limit {limit}: {error}");
            assert_eq!(live::names(path.parent().unwrap()), [""; 0], "{way}, limit {limit}");
            assert_eq!(signals(), before, "{way}, limit {limit}");
            // The guest goes on.
            vcpus.resume();
            live::progress(&vcpus, &image, 1);
        }
    }
    for way in WAYS {
        write(way, &vcpus, &host, path).unwrap();
        assert_eq!(signals(), before, "{way}");
    }
    vcpus.resume();
    live::finish(&vcpus, &image, &bus, &Kind::SMALL);
}

/// A memfd that its other owner cuts off: behind a random page there is no memory.
fn cut_off(path: &Path) {
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    for _ in 0..8 {
        let (start, length) = (0u64, 4u64 << 20);
        let file = File::from(memfd_create("theirs", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(length).unwrap();
        let map = (
            GuestAddress(start),
            usize::try_from(length).unwrap(),
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        );
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([map]).unwrap();
        let ram = Arc::new(GuestRam::adopt(memory, |_| "ram".into()).unwrap());
        for page in (0..length).step_by(4096 * 5) {
            ram.write(GuestAddr(page), &[0x77; 4096]).unwrap();
        }
        let machine = NewVm::new(&Kvm::new().unwrap(), Arc::clone(&ram), MachineConfig::bare(1)).unwrap();
        let paused = VcpuOptions::default().paused();
        let vcpus = Vcpus::start(machine, Arc::new(Signals::default()), paused).unwrap();
        vmm_glue::save(&vcpus, &host, path, &SaveOptions::default()).unwrap();
        let bytes = std::fs::read(path).unwrap();
        let page = random.random_range(1..length >> 12);
        let at = start + (page << 12);
        // It was there.
        ram.write(GuestAddr(at), &[0x5a; 100]).unwrap();
        file.set_len(page << 12).unwrap();
        // What our threads do, and what devices do through us.
        for way in WAYS {
            let error = write(way, &vcpus, &host, path).expect_err("a part of it is gone");
            assert!(error.contains("cut off") && error.contains(&GuestAddr(at).to_string()), "{way}: {error}");
            assert!(std::fs::read(path).unwrap() == bytes, "the last file is as it was");
        }
        let mut found = [0; 200];
        let error = ram.read(GuestAddr(at - 100), &mut found).unwrap_err();
        assert!(error.to_string().contains("guest memory at"), "{error}");
        let error = ram.write(GuestAddr(at - 100), &[1; 200]).unwrap_err();
        assert!(error.to_string().contains("guest memory at"), "{error}");
        ram.read(GuestAddr(at - 100), &mut found[..100]).unwrap();
        // It is back, and zero.
        file.set_len(length).unwrap();
        ram.read(GuestAddr(at), &mut found[..100]).unwrap();
        assert_eq!(found[..100], [0; 100]);
    }
}

#[test]
fn devices_read_and_write_across_pieces_and_not_beyond() {
    use page_units::ByteLen;
    // Two pieces side by side, and a gap.
    let specs = [RamSpec::new("a").at(GuestAddr(0), ByteLen(8192)).at(GuestAddr(8192), ByteLen(4096))];
    let ram = GuestRam::allocate(&specs, Backing::Memfd).unwrap();
    let content: Vec<u8> = (0..9000).map(|at| u8::try_from(at % 251).unwrap()).collect();
    ram.write(GuestAddr(3000), &content).unwrap();
    let mut found = vec![0; content.len()];
    ram.read(GuestAddr(3000), &mut found).unwrap();
    assert!(found == content);
    for (at, len) in [(12_000, 289), (12_288, 1), (u64::MAX, 1)] {
        let error = ram.read(GuestAddr(at), &mut found[..len]).unwrap_err();
        assert!(error.to_string().contains("there is no RAM"), "{error}");
    }
    ram.read(GuestAddr(12_000), &mut found[..288]).unwrap();
    ram.read(GuestAddr(1 << 40), &mut []).unwrap();
}
