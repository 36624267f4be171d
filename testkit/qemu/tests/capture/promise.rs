//! What QEMU can't show at one instant is refused before anything stops, or said.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mapped_ram::Snapshot;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, MemoryBackend, Qemu, Setup};

use crate::support::{MIB, Place, at_work, capture, figures, goes_on, is_as_before};

/// A process that is ended with the test.
struct Other(Child);

impl Other {
    fn name(&self, program: &str) -> String {
        format!("process {} ({program})", self.0.id())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn with(setup: &Setup, arguments: &str) -> Setup {
    Setup { extra: arguments.split_whitespace().map(str::to_owned).collect(), ..setup.clone() }
}

/// Refused with these words and the option that allows it, and nothing has happened; then it is allowed.
fn refused_then_allowed(qemu: &mut Qemu, allow: &str, words: &[&str]) {
    let place = Place::new();
    qemu.qmp().forget_events();
    let refused = capture(qemu, &place.file(), &["--json"]);
    for word in words.iter().copied().chain([&*format!("--allow {allow}")]) {
        assert!(refused.error().contains(word), "{refused:?}");
    }
    assert_eq!(refused.stderr.lines().count(), 1, "{refused:?}");
    assert!(qemu.qmp().wait_event(&["STOP"], Duration::ZERO).unwrap().is_none());
    is_as_before(qemu);
    assert_eq!(place.files(), [""; 0]);
    let allowed = capture(qemu, &place.file(), &["--json", "--allow", allow]);
    let (_, captured) = figures(&allowed);
    let warned = captured["warnings"].as_array().unwrap().iter().any(|text| text.as_str().unwrap().contains(words[0]));
    assert!(warned && allowed.stderr.contains(words[0]), "{allowed:?}");
    Snapshot::open(place.file()).unwrap();
    goes_on(qemu);
}

#[test]
fn memory_that_another_process_can_write() {
    testkit::require!(Qemu, Userfaultfd);
    let file = tempfile::Builder::new().prefix("fastload-ram-").tempfile_in("/dev/shm").unwrap();
    let setup = Setup { backend: MemoryBackend::File(file.path().to_owned()), ..Setup::new(Machine::Pc, 32) };
    let mut qemu = at_work(&setup);
    let maps = |access: &str| {
        let script = format!(
            "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0, access=mmap.{access}); \
             print(1, flush=True); sys.stdin.read()"
        );
        let mut command = Command::new("python3");
        command.args(["-c", &script]).arg(file.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 2]).unwrap();
        Other(child)
    };
    let writer = maps("ACCESS_WRITE");
    refused_then_allowed(&mut qemu, "shared-memory", &[&writer.name("python3"), "pc.ram", "one instant"]);
    drop(writer);
    // Nobody has it, or only to look at: that it is shared is said.
    let _reader = maps("ACCESS_READ");
    let place = Place::new();
    let ended = capture(&qemu, &place.file(), &["--json"]);
    figures(&ended);
    assert!(ended.stderr.contains("pc.ram is shared"), "{ended:?}");
}

#[test]
fn vhost_user_devices() {
    testkit::require!(Qemu, QemuTools, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let export = format!("type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={}", socket.display());
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon.args(["--blockdev", "driver=null-co,node-name=n,size=1048576,read-zeroes=on", "--export", &export]);
    let _daemon = Other(daemon.stdin(Stdio::null()).spawn().unwrap());
    let until = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < until, "it does not listen");
        std::thread::yield_now();
    }
    let device = format!("-chardev socket,id=v,path={} -device vhost-user-blk-pci,id=b0,chardev=v", socket.display());
    let setup = Setup { backend: MemoryBackend::Memfd, ..Setup::new(Machine::Pc, 32) };
    let mut qemu = at_work(&with(&setup, &device));
    refused_then_allowed(&mut qemu, "shared-memory", &["vhost-user", "b0", "one instant"]);
}

#[test]
fn flash_memory_that_the_guest_can_write() {
    testkit::require!(Qemu, Userfaultfd);
    let firmware = ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin"].map(Path::new);
    let firmware = firmware.into_iter().find(|path| path.exists()).expect("QEMU's own firmware");
    let dir = tempfile::tempdir().unwrap();
    let variables = dir.path().join("variables");
    fs::write(&variables, vec![0xff; 128 << 10]).unwrap();
    let flash = |read_only: &str| {
        let (firmware, variables) = (firmware.display(), variables.display());
        format!(
            "-drive if=pflash,unit=0,format=raw,readonly=on,file={firmware} \
             -drive if=pflash,unit=1,format=raw,readonly={read_only},file={variables}"
        )
    };
    let setup = Setup::new(Machine::Pc, 32);
    let mut qemu = at_work(&with(&setup, &flash("off")));
    refused_then_allowed(&mut qemu, "flash", &["flash memory (system.flash1)", "QMP stop"]);
    // As the message says: a guest that stands still does not write.
    qemu.execute("stop", serde_json::json!({})).unwrap();
    let place = Place::new();
    figures(&capture(&qemu, &place.file(), &["--json"]));
    qemu.execute("cont", serde_json::json!({})).unwrap();
    goes_on(&mut qemu);
    drop(qemu);
    let qemu = at_work(&with(&setup, &flash("on")));
    figures(&capture(&qemu, &place.file(), &["--json"]));
}

/// The kernel merges pages as long as this lives, and does as before then.
struct Merging(String);

const RUN: &str = "/sys/kernel/mm/ksm/run";

impl Merging {
    fn start() -> Merging {
        let before = fs::read_to_string(RUN).unwrap();
        fs::write(RUN, "1").unwrap();
        Merging(before)
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        let _ = fs::write(RUN, self.0.trim());
    }
}

#[test]
fn memory_that_the_kernel_merges() {
    testkit::require!(Qemu, Userfaultfd, Root);
    if !Path::new(RUN).exists() {
        return testkit::require::without("KSM", "this kernel has none");
    }
    let mut qemu = at_work(&with(&Setup::new(Machine::Pc, 32), "-machine mem-merge=on"));
    let merging = Merging::start();
    refused_then_allowed(&mut qemu, "merging", &["KSM", "one instant", "mem-merge=off"]);
    // As the message says.
    let place = Place::new();
    let refused = capture(&qemu, &place.file(), &["--json"]);
    let (_, rest) = refused.error().split_once("Stop that (").unwrap();
    assert!(Command::new("sh").args(["-c", rest.split_once(')').unwrap().0]).status().unwrap().success());
    figures(&capture(&qemu, &place.file(), &["--json"]));
    drop(merging);
}

/// What is not there yet is made by QEMU's reading it.
#[test]
fn memory_that_a_capture_would_allocate_is_said() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup { backend: MemoryBackend::Memfd, ..Setup::new(Machine::Pc, 256) };
    let mut qemu = Qemu::start(&setup, &Plan::check(8 * MIB).build()).unwrap();
    qemu.wait_ready().unwrap();
    let place = Place::new();
    let ended = capture(&qemu, &place.file(), &["--json"]);
    figures(&ended);
    assert!(ended.stderr.contains("pc.ram takes 24") && ended.stderr.contains("more of the host"), "{ended:?}");
    // Now it is there.
    let again = capture(&qemu, &place.file(), &["--json"]);
    assert!(!again.stderr.contains("more of the host"), "{again:?}");
}

#[test]
fn a_machine_without_memory_is_refused() {
    testkit::require!(Qemu);
    let dir = tempfile::tempdir().unwrap();
    let qmp: PathBuf = dir.path().join("qmp");
    let server = format!("unix:{},server=on,wait=off", qmp.display());
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-machine", "none", "-nodefaults", "-display", "none", "-qmp", &server]).stdin(Stdio::null());
    let _qemu = Other(command.spawn().unwrap());
    let until = Instant::now() + Duration::from_secs(30);
    while !qmp.exists() {
        assert!(Instant::now() < until, "it does not listen");
        std::thread::yield_now();
    }
    let place = Place::new();
    let arguments = ["capture", "--qmp", &qmp.display().to_string(), &place.file().display().to_string()];
    let ended = Fastload::start(arguments).unwrap().finish().unwrap();
    assert!(ended.error().contains("-machine none"), "{ended:?}");
    assert_eq!(place.files(), [""; 0]);
}

/// One that can't keep a paused guest paused says so, and does not run it.
#[test]
fn a_paused_guest_of_an_older_qemu() {
    testkit::require!(Qemu, OlderQemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 32).older());
    let place = Place::new();
    figures(&capture(&qemu, &place.file(), &["--json"]));
    qemu.execute("stop", serde_json::json!({})).unwrap();
    let refused = capture(&qemu, &place.file(), &["--json"]);
    assert!(refused.error().contains("QEMU 7.2") && refused.error().contains("let it run"), "{refused:?}");
    assert_eq!(qemu.qmp().run_state().unwrap(), "paused");
    qemu.execute("cont", serde_json::json!({})).unwrap();
    goes_on(&mut qemu);
}
