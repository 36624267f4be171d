//! QMP as people use it: QEMU's own spellings, several monitors, sockets that are held, other roots, odd paths.

use std::ffi::OsStr;
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Ended, Fastload, Machine, Qemu, Setup};

use crate::MIB;
use crate::support::{How, Saved};

fn small() -> (Setup, Saved) {
    let setup = Setup::new(Machine::Pc, 32);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    (setup, saved)
}

fn waiting(saved: &Saved, setup: &Setup, arguments: &[&str]) -> Qemu {
    saved.waiting(&Setup { extra: arguments.iter().map(|word| (*word).to_owned()).collect(), ..setup.clone() })
}

fn load(saved: &Saved, address: impl AsRef<OsStr>, more: &[&str]) -> Ended {
    let mut arguments = vec![OsStr::new("load"), saved.file.as_os_str(), OsStr::new("--qmp"), address.as_ref()];
    arguments.extend(["--json"].iter().chain(more).map(OsStr::new));
    Fastload::start(arguments).unwrap().finish().unwrap()
}

#[test]
fn qemus_own_spellings_and_several_monitors() {
    testkit::require!(Qemu, Userfaultfd);
    let (setup, saved) = small();
    let dir = tempfile::tempdir().unwrap();
    let second = dir.path().join("second").display().to_string();
    let tcp = format!("tcp:{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let (unix, tcp_server) = (format!("unix:{second},server=on,wait=off"), format!("{tcp},server=on,wait=off"));
    for (option, server, address) in [
        ("-qmp", &unix, &unix),
        ("-qmp-pretty", &unix, &second),
        ("-qmp", &tcp_server, &tcp),
        ("-qmp-pretty", &tcp_server, &tcp_server),
    ] {
        let mut qemu = waiting(&saved, &setup, &[option, server]);
        // Another client of the first monitor is in nobody's way.
        let other = UnixStream::connect(qemu.qmp_path()).unwrap();
        let figures = load(&saved, address, &[]).figures();
        assert_eq!(figures["state"], "running", "{option} {server}");
        drop(other);
        if address.starts_with("tcp:") {
            let out = dir.path().join("out").display().to_string();
            let ended = Fastload::start(["capture", "--qmp", address, &out]).unwrap().finish().unwrap();
            assert!(ended.error().contains("unix socket"), "{ended:?}");
        }
        saved.is_whole(&mut qemu);
    }
    let ended = load(&saved, "localhost:4444", &[]);
    assert!(ended.error().contains("tcp:localhost:4444"), "{ended:?}");
    assert_eq!(load(&saved, "tcp:localhost", &[]).status.code(), Some(2));
}

/// A guest is recovered by a pretty monitor as well, whether or not it holds QEMU up.
#[test]
fn a_pretty_monitor_recovers() {
    testkit::require!(Qemu, Userfaultfd);
    let (setup, saved) = small();
    let dir = tempfile::tempdir().unwrap();
    let second = dir.path().join("second").display().to_string();
    let mut qemu = waiting(&saved, &setup, &["-qmp-pretty", &format!("unix:{second},server=on,wait=off")]);
    let file = saved.file.display().to_string();
    let server = Fastload::start(["load", &file, "--qmp", &second, "--no-background"]).unwrap();
    qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().unwrap();
    server.kill().unwrap();
    // The process that stands by reads what QEMU prints.
    let told = load(&saved, &second, &[]);
    assert_eq!(told.typed("load", &["--json"]).figures()["recovered"], true);
    saved.is_whole(&mut qemu);
}

#[test]
fn paths_of_any_length_and_bytes() {
    testkit::require!(Qemu, Userfaultfd);
    let (setup, saved) = small();
    let names: [&[u8]; 4] = [b"a, b", b"it's\xff", &[b'l'; 200], "\u{e4}\n".as_bytes()];
    for name in names {
        let dir = tempfile::tempdir().unwrap();
        let (before, after) = (dir.path().join("d"), dir.path().join(OsStr::from_bytes(name)));
        std::fs::create_dir(&before).unwrap();
        let server = format!("unix:{}/q,server=on,wait=off", before.display());
        let mut qemu = waiting(&saved, &setup, &["-qmp", &server]);
        std::fs::rename(&before, &after).unwrap();
        let path = after.join("q");
        let arguments = [
            OsStr::new("load"),
            saved.file.as_os_str(),
            "--qmp".as_ref(),
            path.as_os_str(),
            "--no-background".as_ref(),
        ];
        let server = Fastload::start(arguments).unwrap();
        qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().unwrap();
        server.kill().unwrap();
        // The command that is told means the same path.
        let told = load(&saved, &path, &[]);
        let recovered = told.typed("load", &["--json"]);
        assert_eq!(recovered.figures()["recovered"], true, "{name:?}");
        let left: Vec<_> = std::fs::read_dir(&after).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["q"], "{name:?}");
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn a_socket_that_is_held_is_named_with_its_holder() {
    testkit::require!(Qemu);
    let (setup, saved) = small();
    let qemu = saved.waiting(&setup);
    let path = qemu.qmp_path();
    // Somebody else is there already, and says nothing.
    let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(1, flush=True); sys.stdin.read()";
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(&path).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = command.spawn().unwrap();
    std::io::Read::read_exact(holder.stdout.as_mut().unwrap(), &mut [0; 2]).unwrap();
    let begun = Instant::now();
    let ended = load(&saved, &path, &[]);
    assert!(begun.elapsed() < Duration::from_secs(30));
    let name = format!("process {} (python3)", holder.id());
    assert!(ended.error().contains(&name) && ended.error().contains("second"), "{ended:?}");
    drop(holder.stdin.take());
    holder.wait().unwrap();

    // QEMU itself is stopped.
    qemu.signal(Signal::SIGSTOP).unwrap();
    let ended = load(&saved, &path, &[]);
    let advice = format!("kill -CONT {}", qemu.id());
    assert!(ended.error().ends_with(&advice), "{ended:?}");
    assert!(Command::new("sh").arg("-c").arg(&advice).status().unwrap().success());
    assert_eq!(load(&saved, &path, &["--paused"]).figures()["state"], "paused");
}

#[test]
fn another_load_that_is_at_work_is_named() {
    testkit::require!(Qemu, Userfaultfd);
    let (setup, saved) = small();
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().unwrap();
    for more in [&[] as &[&str], &["--recover"]] {
        let ended = saved.load(&qemu, more);
        assert!(ended.error().contains(&format!("process {} (fastload)", server.id())), "{ended:?}");
    }
    server.signal(Signal::SIGINT).unwrap();
    assert!(server.finish().unwrap().status.success());
    saved.is_whole(&mut qemu);
}

/// QEMU sees another directory under the name of ours: it is given the directory itself.
#[test]
fn a_qemu_in_another_mount_namespace_is_recovered() {
    testkit::require!(Qemu, Userfaultfd, Root);
    let (setup, saved) = small();
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (near, far) = (ours.path().display(), theirs.path().display());
    let script = format!("mount --bind {near} {far} && mount -t tmpfs none {near} && exec \"$0\" \"$@\"");
    let within = ["unshare", "-m", "sh", "-c", &script].map(str::to_owned).to_vec();
    let setup = Setup { within, ..setup };
    let mut qemu = waiting(&saved, &setup, &["-qmp", &format!("unix:{far}/q,server=on,wait=off")]);
    killed_and_recovered(&saved, &mut qemu, &ours.path().join("q"));
    saved.is_whole(&mut qemu);
}

/// QEMU sees nothing but a directory of its own.
#[test]
fn a_qemu_in_another_root_directory_is_recovered() {
    testkit::require!(Qemu, Userfaultfd, Root);
    let (setup, saved) = small();
    let (dir, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = format!("unix:{}/q,server=on,wait=off", dir.path().display());
    let chroot = format!("chroot={}", root.path().display());
    let mut qemu = waiting(&saved, &setup, &["-qmp", &server, "-run-with", &chroot]);
    killed_and_recovered(&saved, &mut qemu, &dir.path().join("q"));
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    // The guest checks its memory itself: QEMU can't write a dump where we could read it.
    assert_eq!(qemu.order('g').unwrap(), (saved.passes, 0));
    while qemu.order('?').unwrap().0 < saved.passes + 2 {}
    assert_eq!(qemu.order('?').unwrap().1, 0);
}

fn killed_and_recovered(saved: &Saved, qemu: &mut Qemu, qmp: &Path) {
    let (file, qmp) = (saved.file.display().to_string(), qmp.display().to_string());
    let server = Fastload::start(["load", &file, "--qmp", &qmp, "--no-background"]).unwrap();
    let resumed = qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap();
    assert!(resumed.is_some(), "{:?}", server.finish());
    server.kill().unwrap();
    assert_eq!(load(saved, &qmp, &["--recover"]).figures()["recovered"], true);
}
