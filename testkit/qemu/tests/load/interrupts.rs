//! Guests that take interrupts: a processor that waits for the page of its interrupt holds QEMU's main thread up.

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use fastload_qmp::QmpError;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use crate::MIB;
use crate::kill::started;
use crate::serve::{listening, serve};
use crate::stuck::standing_by;
use crate::support::{How, Saved};

/// A guest that stands still but for its interrupts, which find their pages missing for 8 seconds.
fn ticking() -> Saved {
    let tables = (2 * MIB, 18 * MIB);
    let plan = Plan { ticks: Some(tables), ranges: vec![(tables.1, 60 * MIB)], ..Plan::check(60 * MIB) };
    Saved::new(&Setup::new(Machine::Pc, 64), &plan, How::default())
}

/// Waits until the guest has taken more interrupts: all that it needs but the page of the next one is there.
fn ticked(qemu: &mut Qemu, more: u64) {
    let before = qemu.ticks().unwrap();
    while qemu.ticks().unwrap() < before + more {}
}

/// Waits until a processor waits for its page, and finds that QEMU hears nobody.
fn held_up(qemu: &mut Qemu) {
    let until = Instant::now() + Duration::from_secs(30);
    let waits = |process: u32| {
        let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map_while(Result::ok);
        // One may be gone by now.
        let mut places = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("wchan")).ok());
        places.any(|place| place == "handle_userfault")
    };
    while !waits(qemu.id()) {
        assert!(Instant::now() < until, "no processor waits");
        std::thread::yield_now();
    }
    qemu.qmp().set_limit(Duration::from_millis(100));
    let answer = qemu.qmp().run_state();
    assert!(matches!(answer, Err(QmpError::Timeout { .. })), "{answer:?}");
    qemu.qmp().set_limit(Duration::from_secs(60));
}

/// The RAM is right, and the guest goes on.
fn is_whole(saved: &Saved, qemu: &mut Qemu) {
    saved.is_whole(qemu);
    ticked(qemu, 3);
}

#[test]
fn a_guest_that_takes_interrupts_is_recovered() {
    testkit::require!(Qemu, Userfaultfd);
    let saved = ticking();
    for (ticks, more) in [(2, &[] as &[&str]), (100, &["--preempt"])] {
        let mut qemu = saved.waiting(&saved.setup);
        let server = Fastload::start(saved.load_arguments(&qemu, &[&["--no-background"], more].concat())).unwrap();
        started(&mut qemu);
        ticked(&mut qemu, ticks);
        server.kill().unwrap();
        held_up(&mut qemu);
        let figures = saved.load(&qemu, &["--recover"]).figures();
        assert_eq!((&figures["recovered"], &figures["state"]), (&json!(true), &json!("running")), "{figures}");
        is_whole(&saved, &mut qemu);
    }
}

/// As soon as it runs, and in the middle of the push: whatever the guest does then.
#[test]
fn a_guest_that_takes_interrupts_is_recovered_from_other_points() {
    testkit::require!(Qemu, Userfaultfd);
    let saved = ticking();
    for pushed in [false, true] {
        let mut qemu = saved.waiting(&saved.setup);
        let mut server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
        started(&mut qemu);
        if pushed {
            ticked(&mut qemu, 2);
            // It takes no more than lies in its socket.
            qemu.signal(Signal::SIGSTOP).unwrap();
            server.signal(Signal::SIGTERM).unwrap();
            let first = BufReader::new(server.stderr().unwrap()).lines().next().unwrap().unwrap();
            assert!(first.contains("sending the rest"), "{first}");
        }
        server.kill().unwrap();
        qemu.signal(Signal::SIGCONT).unwrap();
        let figures = saved.load(&qemu, &["--recover"]).figures();
        assert!(figures["background_pages"].as_u64().unwrap() > 5_000, "{figures}");
        is_whole(&saved, &mut qemu);
    }
}

/// Nobody is left whom QEMU would hear: that is said, and what it says helps.
#[test]
fn without_who_stands_by_it_takes_a_client_that_was_there_before() {
    testkit::require!(Qemu, Userfaultfd);
    let saved = ticking();
    let mut qemu = saved.waiting(&saved.setup);
    let server = Fastload::start(saved.load_arguments(&qemu, &["--no-background"])).unwrap();
    started(&mut qemu);
    // It was there before the guest.
    kill(standing_by(&server).unwrap(), Signal::SIGKILL).unwrap();
    ticked(&mut qemu, 2);
    server.kill().unwrap();
    held_up(&mut qemu);
    let begun = Instant::now();
    let ended = saved.load(&qemu, &["--recover"]);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let error = ended.error();
    assert!(error.contains("does not answer") && error.contains("held up by its guest"), "{ended:?}");
    let (_, rest) = error.split_once("out of band: ").unwrap();
    let (command, again) = rest.split_once("; then: fastload ").unwrap();
    let command: Value = serde_json::from_str(command).unwrap();
    assert_eq!(command["exec-oob"], "migrate-recover", "{ended:?}");
    // The harness's own connection is such a client.
    qemu.qmp().execute_out_of_band("migrate-recover", command["arguments"].clone()).unwrap();
    let recovered = Fastload::start(again.split(' ').chain(["--json"])).unwrap().finish().unwrap();
    assert_eq!(recovered.figures()["recovered"], true);
    is_whole(&saved, &mut qemu);
}

#[test]
fn serve_is_recovered_by_a_client_that_was_there_before() {
    testkit::require!(Qemu, Userfaultfd);
    let saved = ticking();
    let dir = tempfile::tempdir().unwrap();
    let uri = |name: &str| format!("unix:{}", dir.path().join(name).display());
    let mut qemu = listening(&saved, &uri("first"), false);
    qemu.set_capabilities(&[("events", true)]).unwrap();
    let first = serve(&saved, &uri("first"), &["--no-background"]);
    started(&mut qemu);
    ticked(&mut qemu, 2);
    first.kill().unwrap();
    held_up(&mut qemu);
    qemu.wait_migration("postcopy-paused").unwrap();
    qemu.qmp().execute_out_of_band("migrate-recover", json!({"uri": uri("second")})).unwrap();
    let figures = serve(&saved, &uri("second"), &["--recover"]).finish().unwrap().figures();
    assert!(figures["background_pages"].as_u64().unwrap() > 5_000, "{figures}");
    qemu.set_capabilities(&[("events", false), ("postcopy-ram", false)]).unwrap();
    is_whole(&saved, &mut qemu);
}
