//! `--paused`, `-S`, snapshots of paused guests.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Setup};

use crate::MIB;
use crate::support::{How, Saved};

#[test]
fn paused_means_that_nothing_runs() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(60 * MIB), How { at_work: true, ..How::default() });
    for preempt in [false, true] {
        let mut qemu = saved.waiting(&setup);
        let more: &[&str] = if preempt { &["--paused", "--preempt"] } else { &["--paused"] };
        let figures = saved.load(&qemu, more).figures();
        assert_eq!((&figures["state"], &figures["running_us"]), (&json!("paused"), &json!(null)), "{figures}");
        assert_eq!(qemu.qmp().run_state().unwrap(), "paused");
        // Not a byte has changed, not even those that a guest at work changes.
        let loaded = qemu.dump().unwrap();
        assert_eq!(testkit_qemu::first_difference(&saved.ram, &loaded, &[]).unwrap(), None);
        saved.is_whole(&mut qemu);
    }
}

#[test]
fn a_guest_that_was_paused_stays_so() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let plan = Plan::check(16 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("snapshot");
    let mut qemu = testkit_qemu::Qemu::start(&setup, &plan.build()).unwrap();
    qemu.wait_ready().unwrap();
    qemu.execute("stop", json!({})).unwrap();
    qemu.save(&file, false, false).unwrap();
    let mut other = testkit_qemu::Qemu::start(&setup.waiting(), &plan.build()).unwrap();
    let arguments = crate::support::load_arguments(&file, &other, &[]);
    let figures = testkit_qemu::Fastload::start(arguments).unwrap().finish().unwrap().figures();
    assert_eq!((&figures["state"], &figures["paused_because"]), (&json!("paused"), &json!("saved-paused")));
    assert_eq!(other.qmp().run_state().unwrap(), "paused");
    other.execute("cont", json!({})).unwrap();
    let (passes, errors) = other.order('?').unwrap();
    assert!(passes > 0 && errors == 0);

    // Without --json it says why, and how to go on.
    let mut other = testkit_qemu::Qemu::start(&setup.waiting(), &plan.build()).unwrap();
    let socket = other.qmp_path().display().to_string();
    let ended = Fastload::start(["load", &file.display().to_string(), "--qmp", &socket]).unwrap().finish().unwrap();
    assert!(ended.status.success() && ended.stderr.contains("it was saved (paused; --run starts it"), "{ended:?}");
    assert_eq!(ended.typed("resume", &[]).stdout, "running\n");
    assert!(other.order('?').unwrap().0 > 0);

    // And --run starts it.
    for stopped in [false, true] {
        let waiting = Setup { stopped, ..setup.waiting() };
        let mut other = testkit_qemu::Qemu::start(&waiting, &plan.build()).unwrap();
        let arguments = crate::support::load_arguments(&file, &other, &["--run"]);
        let figures = Fastload::start(arguments).unwrap().finish().unwrap().figures();
        assert_eq!((&figures["state"], &figures["paused_because"]), (&json!("running"), &json!(null)), "{figures}");
        assert!(other.order('?').unwrap().0 > 0);
    }
}

#[test]
fn a_qemu_started_with_s_stays_paused() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    let mut qemu = saved.waiting(&Setup { stopped: true, ..setup });
    let figures = saved.load(&qemu, &[]).figures();
    assert_eq!((&figures["state"], &figures["paused_because"]), (&json!("paused"), &json!("started-with-S")));
    saved.is_whole(&mut qemu);
}

/// Processor time that a process has used.
fn used(process: u32) -> Duration {
    // utime and stime of proc_pid_stat(5), the 14th and 15th field; the second is the name in parentheses.
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: u64 = fields[11..=12].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    // A hundred in a second, on x86-64.
    Duration::from_millis(ticks * 10)
}

/// The monitor goes away while the guest is served: that is told at the end, and nothing turns round and round.
#[test]
fn a_monitor_that_hangs_up() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
    // Started with -S: the event that the guest runs never comes.
    let mut qemu = saved.waiting(&Setup { stopped: true, ..setup });
    let path = qemu.dir().join("between");
    let door = UnixListener::bind(&path).unwrap();
    let file = saved.file.display().to_string();
    let arguments = ["load", &file, "--qmp", &path.display().to_string(), "--no-background"];
    let server = Fastload::start(arguments).unwrap();
    let (near, far) = (door.accept().unwrap().0, UnixStream::connect(qemu.qmp_path()).unwrap());
    let copies = [(&near, &far), (&far, &near)].map(|(from, to)| {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from, &mut to))
    });
    qemu.set_capabilities(&[("events", true)]).unwrap();
    let mut state = String::new();
    while state != "postcopy-active" {
        state = qemu.qmp().migration().unwrap().0;
    }
    near.shutdown(Shutdown::Both).unwrap();
    far.shutdown(Shutdown::Both).unwrap();
    for copy in copies {
        // However it ended.
        let _ = copy.join().unwrap();
    }
    let before = used(server.id());
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(500) {
        // Meanwhile QEMU is there.
        qemu.qmp().wait_event(&["RESUME"], Duration::from_millis(100)).unwrap();
    }
    let spent = used(server.id()) - before;
    assert!(spent < Duration::from_millis(150), "{spent:?} of {:?}", begun.elapsed());
    server.signal(nix::sys::signal::Signal::SIGINT).unwrap();
    let ended = server.finish().unwrap();
    assert!(ended.error().contains("QMP"), "{ended:?}");
    qemu.set_capabilities(&[("events", false), ("postcopy-ram", false)]).unwrap();
    saved.is_whole(&mut qemu);
}
