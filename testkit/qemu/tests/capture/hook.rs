//! `--exec-frozen`: disks that belong to the file.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mapped_ram::Snapshot;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testkit_qemu::guest::Plan;
use testkit_qemu::{Ended, Fastload, Machine, Qemu, Setup};

use crate::support::{Place, arguments, at_work, block, capture, generations, goes_on, is_as_before, is_one_instant};

fn image(place: &Path) -> PathBuf {
    let path = place.join("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status().unwrap();
    assert!(made.success());
    path
}

fn with_disk(setup: &Setup, image: &Path) -> Setup {
    let drive = format!("if=ide,format=qcow2,file={}", image.display());
    Setup { extra: vec!["-drive".into(), drive], ..setup.clone() }
}

/// A guest that writes the number of its pass to its memory and to its disk.
fn with_counter(setup: &Setup) -> Plan {
    Plan { disk: true, ..generations(setup) }
}

/// What the guest wrote to its disk last.
fn on_disk(image: &Path) -> u64 {
    let raw = image.with_extension("raw");
    let command = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
    assert!(Command::new("qemu-img").args(command).arg(image).arg(&raw).status().unwrap().success());
    u64::from_le_bytes(fs::read(&raw).unwrap()[..8].try_into().unwrap())
}

fn events(ended: &Ended) -> Vec<Value> {
    assert!(ended.status.success(), "{ended:?}");
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The guest itself compares, in each of its passes.
fn finds_its_disk(qemu: &mut Qemu) {
    goes_on(qemu);
    assert_eq!(qemu.order('?').unwrap().1, 0, "the disk and the memory do not agree");
}

fn memory_and_disk_agree(setup: &Setup) {
    let (place, disks) = (Place::new(), tempfile::tempdir().unwrap());
    let image = image(disks.path());
    let copy = disks.path().join("copy.qcow2");
    let with = with_disk(setup, &image);
    let mut qemu = Qemu::start(&with, &with_counter(setup).build()).unwrap();
    qemu.wait_ready().unwrap();
    finds_its_disk(&mut qemu);

    let how = if setup.older { "qemu-img convert -U -O qcow2" } else { "cp --reflink=auto" };
    let command = format!("{how} \"$FASTLOAD_DISKS\" {}", copy.display());
    let ended = capture(&qemu, &place.file(), &["--json", "--exec-frozen", &command]);
    let events = events(&ended);
    let names: Vec<&Value> = events.iter().map(|event| &event["event"]).collect();
    assert_eq!(names, ["frozen", "resumed", "complete"], "{ended:?}");
    let (frozen, resumed, captured) = (&events[0], &events[1], &events[2]);
    assert_eq!(frozen["frozen_at_us"], captured["frozen_at_us"]);
    assert_eq!(resumed["blackout_us"], captured["blackout_us"]);
    assert!(resumed["blackout_us"].as_u64().unwrap() > 0, "{ended:?}");
    assert_eq!(captured["disks"], json!([image.display().to_string()]));
    is_as_before(&mut qemu);
    finds_its_disk(&mut qemu);

    let ram = block(&Snapshot::open(place.file()).unwrap(), "pc.ram");
    let status = is_one_instant(&ram, setup);
    assert!((status.generation..=status.generation + 1).contains(&on_disk(&copy)), "{status:?}, {}", on_disk(&copy));
    // A copy that is made later does not belong to it.
    qemu.execute("stop", json!({})).unwrap();
    assert!(on_disk(&image) > status.generation + 1);
    drop(qemu);

    // The guest runs: the file does not say that it was paused.
    let with = Setup { extra: with_disk(setup, &copy).extra, ..setup.clone() };
    let mut loaded = Qemu::start(&with.waiting(), &with_counter(setup).build()).unwrap();
    let (file, qmp) = (place.file().display().to_string(), loaded.qmp_path().display().to_string());
    let ended = Fastload::start(["load", &file, "--qmp", &qmp, "--json"]).unwrap().finish().unwrap();
    assert_eq!(ended.figures()["state"], "running", "{ended:?}");
    finds_its_disk(&mut loaded);
    assert!(loaded.status().unwrap().generation > status.generation);
    drop(loaded);
    if setup.older {
        return;
    }
    // QEMU's own loader runs it too. (The disk has gone on meanwhile, which is another matter.)
    let mut loaded = Qemu::start(&with.waiting(), &with_counter(setup).build()).unwrap();
    loaded.set_capabilities(&[("mapped-ram", true)]).unwrap();
    loaded.execute("migrate-incoming", json!({"uri": format!("file:{file}")})).unwrap();
    assert!(loaded.qmp().wait_event(&["RESUME"], Duration::from_secs(60)).unwrap().is_some(), "{}", loaded.stderr());
    goes_on(&mut loaded);
}

/// What the tests here rely on.
#[test]
fn a_guest_finds_out_that_its_disk_is_another() {
    testkit::require!(Qemu, QemuTools);
    let setup = Setup::new(Machine::Pc, 32);
    let disks = tempfile::tempdir().unwrap();
    let image = disks.path().join("disk.raw");
    let mut content = vec![0; 1 << 20];
    content[0] = 7;
    fs::write(&image, content).unwrap();
    let drive = format!("if=ide,format=raw,file={}", image.display());
    let with = Setup { extra: vec!["-drive".into(), drive], ..setup.clone() };
    let mut qemu = Qemu::start(&with, &with_counter(&setup).build()).unwrap();
    qemu.wait_ready().unwrap();
    goes_on(&mut qemu);
    assert_eq!(qemu.order('?').unwrap().1, 1);
}

#[test]
fn memory_and_disk_agree_after_a_capture_and_a_load() {
    testkit::require!(Qemu, QemuTools, Userfaultfd);
    memory_and_disk_agree(&Setup::new(Machine::Pc, 32));
}

#[test]
fn memory_and_disk_agree_in_an_older_qemu() {
    testkit::require!(Qemu, QemuTools, OlderQemu, Userfaultfd);
    memory_and_disk_agree(&Setup::new(Machine::Pc, 32).older());
}

/// Nothing is copied: the guest goes on in an overlay, which QEMU is told to make through another monitor.
#[test]
fn the_image_itself_is_kept_and_the_guest_goes_on_in_an_overlay() {
    testkit::require!(Qemu, QemuTools, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 32);
    let (place, disks) = (Place::new(), tempfile::tempdir().unwrap());
    let image = image(disks.path());
    let second = disks.path().join("second");
    let mut with = with_disk(&setup, &image);
    with.extra.extend(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", second.display())]);
    let mut qemu = Qemu::start(&with, &with_counter(&setup).build()).unwrap();
    qemu.wait_ready().unwrap();
    let overlay = disks.path().join("overlay.qcow2");
    let script = disks.path().join("script");
    let order = json!({
        "execute": "blockdev-snapshot-sync",
        "arguments": {"device": "ide0-hd0", "snapshot-file": overlay.display().to_string()},
        "id": "last",
    });
    let python = format!(
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({:?})\n\
         s.sendall(b'{{\"execute\": \"qmp_capabilities\"}}' + {:?}.encode())\nf = s.makefile()\n\
         line = next(line for line in f if 'last' in line)\nassert 'error' not in line, line\n",
        second.display().to_string(),
        order.to_string(),
    );
    fs::write(&script, python).unwrap();
    let command = format!("python3 {}", script.display());
    let ended = capture(&qemu, &place.file(), &["--json", "--exec-frozen", &command]);
    assert!(ended.status.success(), "{ended:?}");
    finds_its_disk(&mut qemu);
    // It writes to its disk what it keeps of it.
    qemu.execute("stop", json!({})).unwrap();
    drop(qemu);
    let status = is_one_instant(&block(&Snapshot::open(place.file()).unwrap(), "pc.ram"), &setup);
    assert!((status.generation..=status.generation + 1).contains(&on_disk(&image)), "{status:?}");
    assert!(on_disk(&overlay) > status.generation + 1);

    // As many guests as you like, each with an overlay of its own on the image that was kept.
    for name in ["one", "two"] {
        let own = disks.path().join(name);
        let command = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
        assert!(Command::new("qemu-img").args(command).args([&image, &own]).status().unwrap().success());
        let with = with_disk(&setup, &own);
        let mut loaded = Qemu::start(&with.waiting(), &with_counter(&setup).build()).unwrap();
        let (file, qmp) = (place.file().display().to_string(), loaded.qmp_path().display().to_string());
        let ended = Fastload::start(["load", &file, "--qmp", &qmp, "--json"]).unwrap().finish().unwrap();
        assert_eq!(ended.figures()["state"], "running", "{ended:?}");
        finds_its_disk(&mut loaded);
    }
}

#[test]
fn a_command_that_fails_or_takes_too_long_captures_nothing_and_the_guest_goes_on() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 32));
    let place = Place::new();
    let notes = tempfile::tempdir().unwrap();
    let process = notes.path().join("process");
    let sleeps = format!("echo $$ > {}; exec sleep 600", process.display());
    for (command, more, words) in [
        ("exit 3", &[] as &[&str], "exit code 3"),
        ("kill -9 $$", &[], "signal: 9"),
        (sleeps.as_str(), &["--exec-limit", "1"], "--exec-limit"),
        ("/nonexistent", &[], "exit code 127"),
    ] {
        let ended = capture(&qemu, &place.file(), &[&["--json", "--exec-frozen", command], more].concat());
        assert!(ended.error().contains(words) && ended.status.code() == Some(1), "{ended:?}");
        assert_eq!(place.files(), [""; 0]);
        is_as_before(&mut qemu);
        goes_on(&mut qemu);
    }
    let id = fs::read_to_string(&process).unwrap();
    assert!(!Path::new(&format!("/proc/{}", id.trim())).exists(), "the command is left");
    // Ctrl-C.
    let mut running = Fastload::start(arguments(&qemu, &place.file(), &["--exec-frozen", "sleep 600"])).unwrap();
    let mut stderr = BufReader::new(running.stderr().unwrap()).lines().map(Result::unwrap);
    assert!(stderr.next().unwrap().contains("frozen at"));
    assert_eq!(qemu.qmp().run_state().unwrap(), "paused");
    running.signal(Signal::SIGINT).unwrap();
    let last = stderr.last().unwrap();
    assert!(last.contains("cancelled"), "{last}");
    assert!(!running.finish().unwrap().status.success());
    is_as_before(&mut qemu);
    goes_on(&mut qemu);
    assert_eq!(place.files(), [""; 0]);
}

/// The command is run as a user's own, and finds what it needs.
#[test]
fn the_command_finds_its_environment() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 32));
    let place = Place::new();
    let command = "echo \"[$FASTLOAD_OUT][$FASTLOAD_QMP][$FASTLOAD_DISKS]\"; grep SigBlk /proc/self/status";
    let ended = capture(&qemu, &place.file(), &["--json", "--exec-frozen", command]);
    let expected = format!("[{}][{}][]", place.file().display(), qemu.qmp_path().display());
    assert!(ended.status.success() && ended.stderr.contains(&expected), "{ended:?}");
    // No signal is kept from it.
    assert!(ended.stderr.contains("SigBlk:\t0000000000000000"), "{ended:?}");
    goes_on(&mut qemu);

    // A guest that is paused stays so, and the file says so.
    qemu.execute("stop", json!({})).unwrap();
    let ended = capture(&qemu, &place.file(), &["--json", "--exec-frozen", "true"]);
    let names: Vec<Value> = events(&ended).iter().map(|event| event["event"].clone()).collect();
    assert_eq!(names, ["complete"], "{ended:?}");
    assert_eq!(qemu.qmp().run_state().unwrap(), "paused");
    let state = Fastload::start(["inspect", "--device", "globalstate", &place.file().display().to_string()]).unwrap();
    let state = state.finish().unwrap();
    let paused: String = b"paused".iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(state.stdout.contains(&paused), "{state:?}");
}

/// Nobody is left to start the guest but the process that stands by.
#[test]
fn a_capture_that_is_killed_while_the_command_runs_leaves_the_guest_running() {
    testkit::require!(Qemu, Userfaultfd);
    let mut qemu = at_work(&Setup::new(Machine::Pc, 32));
    let place = Place::new();
    let notes = tempfile::tempdir().unwrap();
    let process = notes.path().join("process");
    let command = format!("echo $$ > {}; exec sleep 600", process.display());
    let mut running = Fastload::start(arguments(&qemu, &place.file(), &["--exec-frozen", &command])).unwrap();
    let line = BufReader::new(running.stderr().unwrap()).lines().next().unwrap().unwrap();
    assert!(line.contains("frozen at"), "{line}");
    let until = Instant::now() + Duration::from_secs(30);
    let id = loop {
        match fs::read_to_string(&process).unwrap_or_default().trim().parse::<i32>() {
            Ok(id) => break id,
            Err(_) => assert!(Instant::now() < until, "the command does not run"),
        }
    };
    qemu.qmp().forget_events();
    running.kill().unwrap();
    assert!(qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().is_some());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(id), Signal::SIGKILL).unwrap();
    goes_on(&mut qemu);
    assert_eq!(place.files(), [""; 0]);
    assert!(capture(&qemu, &place.file(), &[]).status.success());
    goes_on(&mut qemu);
}
