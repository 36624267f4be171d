//! Files that people have, with a real QEMU: what libvirt saved is loaded, and what is told to be typed is typed.

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use testkit::{require, samples};
use testkit_qemu::fastload;

/// How long QEMU may take to open its socket, at the utmost.
const LIMIT: Duration = Duration::from_secs(60);

/// Ended with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu(words: &[&str], qmp: &Path) -> Ends {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-cpu", "qemu64", "-nodefaults", "-display", "none"]).args(words);
    command.args(["-qmp", &format!("unix:{},server=on,wait=off", qmp.display())]);
    let qemu = Ends(command.stdin(Stdio::null()).spawn().unwrap());
    let begun = Instant::now();
    while !qmp.exists() {
        assert!(begun.elapsed() < LIMIT, "QEMU has no socket");
        std::thread::yield_now();
    }
    qemu
}

fn run(words: &[&str]) -> Output {
    Command::new(fastload()).args(words).output().unwrap()
}

fn last(output: &Output) -> Value {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    serde_json::from_str(text.lines().last().unwrap_or_else(|| panic!("{output:?}"))).unwrap()
}

/// Images that a real libvirt saved: the guest runs if it ran, and is paused if it was.
#[test]
fn images_of_libvirts_run_if_libvirt_says_so() {
    require!(Qemu, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    for (name, state) in [("sparse", "running"), ("paused", "paused")] {
        let image = samples::libvirt(&format!("{name}.save"), dir.path()).unwrap();
        let qmp = dir.path().join(format!("{name}.qmp"));
        let words = ["-machine", "pc-i440fx-10.0,usb=off", "-m", "32", "-no-user-config", "-incoming", "defer"];
        let _qemu = qemu(&words, &qmp);
        let (image, qmp) = (image.to_str().unwrap(), qmp.to_str().unwrap());
        // A check changes nothing: the load works after it.
        let checked = run(&["load", image, "--qmp", qmp, "--check-only", "--timeout", "30", "--json"]);
        assert_eq!((checked.status.code(), &last(&checked)["fits"]), (Some(0), &true.into()), "{checked:?}");
        let loaded = run(&["load", image, "--qmp", qmp, "--json"]);
        let figures = last(&loaded);
        assert_eq!((loaded.status.code(), &figures["state"]), (Some(0), &state.into()), "{loaded:?}");
        let events = std::str::from_utf8(&loaded.stdout).unwrap();
        let wanted = if state == "running" { "running" } else { "loaded" };
        assert!(events.contains(&format!("\"event\":\"{wanted}\"")), "{events}");
        // Of one that has run there is nothing to check any more.
        assert_eq!(run(&["load", image, "--qmp", qmp, "--check-only"]).status.code(), Some(1));
    }
    // Another machine is found out before anything is loaded.
    let image = samples::libvirt("sparse.save", dir.path()).unwrap();
    let qmp = dir.path().join("other.qmp");
    let _qemu = qemu(&["-machine", "pc-i440fx-10.0,usb=off", "-m", "64", "-incoming", "defer"], &qmp);
    let refused = run(&["load", image.to_str().unwrap(), "--qmp", qmp.to_str().unwrap(), "--check-only", "--json"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(last(&refused)["message"].as_str().unwrap().contains("-m"), "{refused:?}");
}

/// A state inside a disk image (`savevm`) comes out by the commands that the message names.
#[test]
fn a_state_inside_a_disk_image_is_brought_out_by_what_is_told() {
    require!(Qemu, QemuTools, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.qcow2");
    let create = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M").status();
    assert!(create.unwrap().success());
    let drive = format!("if=ide,format=qcow2,file={}", disk.display());
    let mut saving = Command::new("qemu-system-x86_64");
    saving.args([
        "-S",
        "-accel",
        "tcg",
        "-m",
        "16",
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "stdio",
        "-drive",
        &drive,
    ]);
    let mut saving = saving.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    saving.stdin.take().unwrap().write_all(b"savevm my-state\nquit\n").unwrap();
    assert!(saving.wait().unwrap().success());

    let said = run(&["check", disk.to_str().unwrap()]);
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(said.contains("1 internal snapshot (savevm): my-state;"), "{said}");
    let option = said.split_once("with it and ").unwrap().1.split_once(", then: ").unwrap().0;
    let qmp = dir.path().join("qmp");
    let words: Vec<&str> = ["-S", "-m", "16", "-drive", &drive].into_iter().chain(option.split(' ')).collect();
    let _qemu = qemu(&words, &qmp);
    let typed = said.rsplit_once("then: fastload ").unwrap().1.trim();
    let out = dir.path().join("out.snap");
    let typed = typed.replace("SOCKET", qmp.to_str().unwrap()).replace("OUT", out.to_str().unwrap());
    let captured = run(&typed.split(' ').collect::<Vec<_>>());
    assert!(captured.status.success(), "{typed}: {captured:?}");
    assert!(run(&["check", out.to_str().unwrap()]).status.success());
}
