//! Recovery where QEMU can't be asked, from the wrong snapshot, and of what was never begun.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use crate::MIB;
use crate::support::{How, Saved, settings_are_back};

/// The process that stands by for this `fastload`.
pub(crate) fn standing_by(server: &Fastload) -> Option<nix::unistd::Pid> {
    let parent = format!("PPid:\t{}", server.id());
    let processes = std::fs::read_dir("/proc").unwrap().map_while(Result::ok);
    let names = processes.filter_map(|entry| entry.file_name().into_string().ok());
    let mut numbers = names.filter_map(|name| name.parse::<i32>().ok());
    let child = numbers.find(|number| {
        // Others may be gone by now.
        std::fs::read_to_string(format!("/proc/{number}/status"))
            .is_ok_and(|text| text.lines().any(|line| line == parent))
    });
    child.map(nix::unistd::Pid::from_raw)
}

/// A guest of which a killed server has brought next to nothing.
fn left_alone(saved: &Saved, more: &[&str]) -> Qemu {
    let mut qemu = saved.waiting(&saved.setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &[&["--no-background"], more].concat())).unwrap();
    qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().unwrap();
    server.kill().unwrap();
    qemu
}

/// What we leave next to the QMP socket.
fn left_behind(qemu: &Qemu) -> Vec<PathBuf> {
    let names = std::fs::read_dir(qemu.dir()).unwrap().map(|entry| entry.unwrap().path());
    names.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".fastload")).collect()
}

/// QEMU's main thread waits for a page of the guest, as it does when a processor takes an interrupt or a device reads its
/// ring. It hears nobody then, but who was there before.
#[test]
fn a_guest_that_holds_qemu_up_is_recovered() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    for more in [&[] as &[&str], &["--preempt"]] {
        let mut qemu = left_alone(&saved, more);
        let arguments = |qemu: &Qemu| saved.load_arguments(qemu, &["--recover", "--no-background"]);
        let (first, process) = (arguments(&qemu), qemu.id());
        let held = thread::spawn(move || {
            // Nobody has touched this one.
            let page = qemu.touch(40 * MIB);
            (qemu, page)
        });
        let until = Instant::now() + Duration::from_secs(30);
        while std::fs::read_to_string(format!("/proc/{process}/wchan")).unwrap() != "handle_userfault" {
            assert!(Instant::now() < until && !held.is_finished(), "its main thread is not held up");
            thread::yield_now();
        }
        // Who does not know that is told.
        let arguments = first.iter().filter(|argument| !["--recover", "--json"].contains(&argument.as_str()));
        let plain = Fastload::start(arguments).unwrap().finish().unwrap();
        assert!(plain.error().contains("waits for the rest of its memory: fastload load"), "{plain:?}");
        let server = Fastload::start(first).unwrap();
        let (mut qemu, page) = held.join().unwrap();
        page.unwrap();
        // Killed again as soon as it answers: it may, or may not, know that already.
        server.kill().unwrap();
        let last = Fastload::start(saved.load_arguments(&qemu, &["--recover"])).unwrap().finish().unwrap();
        assert_eq!(last.figures()["recovered"], true);
        assert_eq!(last.figures()["preempt"], !more.is_empty());
        assert_eq!(left_behind(&qemu), [] as [PathBuf; 0]);
        saved.is_whole(&mut qemu);
    }
}

/// Who repeats the command after a crash is told what helps, and not what ends the guest: by each QEMU, with and without
/// preempt.
#[test]
fn who_forgets_to_recover_is_told() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup { version: Some("7.2"), ..Setup::new(Machine::Pc, 32) };
    let saved = Saved::new(&setup, &Plan::check(28 * MIB), How::default());
    let mut ways = vec![(setup.clone(), &[] as &[&str]), (setup.clone(), &["--preempt"])];
    if testkit::require::have(&[testkit::require::Prerequisite::OlderQemu]) {
        ways.push((setup.older(), &[]));
    }
    for (waiting, more) in ways {
        let mut qemu = saved.waiting(&waiting);
        let server = Fastload::start(saved.load_arguments(&qemu, &[&["--no-background"], more].concat())).unwrap();
        qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().unwrap();
        server.kill().unwrap();
        // It may not have noticed yet, and may be held up.
        let again = saved.load(&qemu, more);
        assert!(again.error().contains("rest of its memory: fastload load"), "{again:?}");
        assert!(!again.error().contains("anew"), "{again:?}");
        let figures = again.typed("load", &[&["--json"], more].concat()).figures();
        assert_eq!((&figures["recovered"], &figures["preempt"]), (&true.into(), &(!more.is_empty()).into()));
        assert_eq!(left_behind(&qemu), [] as [PathBuf; 0]);
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn another_snapshot_brings_no_recovery() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let plan = Plan::check(60 * MIB);
    let (saved, other) = (Saved::new(&setup, &plan, How::default()), Saved::new(&setup, &plan, How::default()));
    let mut qemu = left_alone(&saved, &[]);
    let refused = other.load(&qemu, &["--recover"]);
    let names = [&other.file, &saved.file].map(|file| file.display().to_string());
    assert!(names.iter().all(|name| refused.error().contains(name)), "{refused:?}");
    assert!(refused.error().contains("not the snapshot"), "{refused:?}");
    // The same one under another name will do.
    let copy = qemu.dir().join("copy");
    std::fs::copy(&saved.file, &copy).unwrap();
    let arguments = crate::support::load_arguments(&copy, &qemu, &["--recover"]);
    assert_eq!(Fastload::start(arguments).unwrap().finish().unwrap().figures()["recovered"], true);
    assert_eq!(left_behind(&qemu), [] as [PathBuf; 0]);
    saved.is_whole(&mut qemu);
}

/// Who asks all processes of a service to end has not ended the one that stands by; it goes with the other.
#[test]
fn who_stands_by_stays_until_the_other_has_ended() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How::default());
    let mut qemu = saved.waiting(&setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap().unwrap();
    let until = Instant::now() + Duration::from_secs(30);
    let ready = |child: &nix::unistd::Pid| {
        // It has said what it does with signals: SigCgt is the set of those that it handles.
        let status = std::fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:\t"));
        caught
            .and_then(|set| u64::from_str_radix(set, 16).ok())
            .is_some_and(|set| set >> (Signal::SIGTERM as u32 - 1) & 1 == 1)
    };
    let child = loop {
        match standing_by(&server).filter(ready) {
            Some(child) => break child,
            None => assert!(Instant::now() < until, "nobody stands by"),
        }
    };
    nix::sys::signal::kill(child, Signal::SIGTERM).unwrap();
    nix::sys::signal::kill(child, Signal::SIGINT).unwrap();
    assert_eq!(standing_by(&server), Some(child));
    server.signal(Signal::SIGTERM).unwrap();
    assert!(server.finish().unwrap().status.success());
    assert!(nix::sys::signal::kill(child, None).is_err(), "it is left");
    saved.is_whole(&mut qemu);
}

#[test]
fn there_is_nothing_to_recover_of_a_qemu_that_is_gone() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let mut qemu = left_alone(&saved, &[]);
    assert_ne!(left_behind(&qemu), [] as [PathBuf; 0]);
    qemu.kill().unwrap();
    for _ in 0..2 {
        let ended = saved.load(&qemu, &["--recover"]);
        assert!(ended.error().contains("nothing to recover") && ended.error().contains("anew"), "{ended:?}");
        assert!(!left_behind(&qemu).iter().any(|path| path.extension().is_some()), "{:?}", left_behind(&qemu));
    }
}

/// Passes QMP on, and calls `at` before the first command with this name.
fn between(door: UnixListener, to: PathBuf, name: &'static str, at: impl FnOnce()) {
    let near = door.accept().unwrap().0;
    let far = UnixStream::connect(to).unwrap();
    let (mut from_far, mut to_near) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let back = thread::spawn(move || {
        // However it ends.
        let _ = std::io::copy(&mut from_far, &mut to_near);
    });
    let (mut at, mut to_far) = (Some(at), &far);
    for line in BufReader::new(near).lines().map_while(Result::ok) {
        if line.contains(name) {
            at.take().into_iter().for_each(|at| at());
        }
        writeln!(to_far, "{line}").unwrap();
    }
    far.shutdown(std::net::Shutdown::Both).unwrap();
    back.join().unwrap();
}

#[test]
fn ctrl_c_before_the_start_puts_the_settings_back() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let mut qemu = saved.waiting(&setup);
    let path = qemu.dir().join("between");
    let (door, to) = (UnixListener::bind(&path).unwrap(), qemu.qmp_path());
    let file = saved.file.display().to_string();
    let mut server = Fastload::start(["load", &file, "--paused", "--qmp", &path.display().to_string()]).unwrap();
    let mut stderr = BufReader::new(server.stderr().unwrap()).lines();
    let process = nix::unistd::Pid::from_raw(i32::try_from(server.id()).unwrap());
    between(door, to, "migrate-set-capabilities", move || {
        nix::sys::signal::kill(process, Signal::SIGINT).unwrap();
        // It has heard it.
        let first = stderr.next().unwrap().unwrap();
        assert!(first.contains("stopping"), "{first}");
    });
    assert_eq!(server.finish().unwrap().status.code(), Some(1));
    assert_eq!(qemu.qmp().migration().unwrap().0, "none");
    settings_are_back(&mut qemu);
    assert_eq!(left_behind(&qemu), [] as [PathBuf; 0]);
    // Nothing is in the way of another attempt.
    assert_eq!(saved.load(&qemu, &[]).figures()["state"], "running");
    saved.is_whole(&mut qemu);
}
