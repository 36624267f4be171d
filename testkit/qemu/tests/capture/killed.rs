//! Captures that are killed, each at a certain system call.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use mapped_ram::Snapshot;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use serde_json::json;
use testkit::at_call::{Call, Is};
use testkit_qemu::{Machine, Qemu, Setup};

use crate::support::{MIB, Place, arguments, at_work, block, capture, figures, goes_on, is_as_before, is_one_instant};

/// Where it is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Point {
    /// QEMU is about to be given the socket.
    Socket,
    /// Its capabilities are on, and it is about to be told to send.
    Migrate,
    /// At the first write beyond this many bytes of the file.
    Bytes(u64),
    /// All has come, and is about to be made durable.
    Sync,
    Link,
    /// It has a temporary name.
    Rename,
}

impl Point {
    fn call(self) -> Call {
        match self {
            Point::Socket => Call::any_of(&[libc::SYS_sendmsg]),
            Point::Migrate => {
                // It is known by its length: there are more than nine commands before it, and no other is as long.
                let command = json!({"execute": "migrate", "arguments": {"uri": "fd:fastload-capture"}, "id": 10});
                let length = format!("{command}\n").len() as u64;
                Call::any_of(&[libc::SYS_write, libc::SYS_sendto]).with(2, Is::Equal(length))
            }
            Point::Bytes(bytes) => Call::any_of(&[libc::SYS_pwrite64]).with(3, Is::AtLeast(bytes)),
            Point::Sync => Call::any_of(&[libc::SYS_fsync]),
            Point::Link => Call::any_of(&[libc::SYS_linkat]),
            Point::Rename => Call::any_of(&[libc::SYS_rename, libc::SYS_renameat, libc::SYS_renameat2]),
        }
    }

    /// Whether QEMU is as it was: not changed yet, or put back already.
    fn leaves_no_trace(self) -> bool {
        !matches!(self, Point::Migrate | Point::Bytes(_))
    }
}

/// Kills a capture there, and looks at what it leaves.
fn killed(qemu: &mut Qemu, place: &Place, point: Point) {
    let mut command = Command::new(testkit_qemu::fastload());
    command.args(arguments(qemu, &place.file(), &[])).stdin(Stdio::null());
    point.call().kills(&mut command);
    let ended = command.output().unwrap();
    assert_eq!(ended.status.signal(), Some(libc::SIGSYS), "{point:?}: {}", String::from_utf8_lossy(&ended.stderr));
    // QEMU notices by itself that nobody reads.
    while ["setup", "active", "device"].contains(&qemu.qmp().migration().unwrap().0.as_str()) {}
    goes_on(qemu);
    if point.leaves_no_trace() {
        is_as_before(qemu);
    } else {
        assert!(qemu.qmp().capabilities().unwrap().0["background-snapshot"], "{point:?}: nobody could put it back");
    }
}

/// What is there next to the old file.
fn others(place: &Place) -> Vec<String> {
    place.files().into_iter().filter(|name| name != "vm.snap").collect()
}

#[test]
fn a_capture_that_is_killed_at_any_point_leaves_the_guest_running() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let mut qemu = at_work(&setup);
    let place = Place::new();
    // Some of the RAM, which is in the file from its second MiB on.
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    let mut points = vec![Point::Socket, Point::Migrate, Point::Bytes(0), Point::Sync, Point::Link, Point::Rename];
    points.extend((0..4).map(|_| Point::Bytes(random.random_range(MIB..61 * MIB))));
    let mut last = 0;
    for point in points {
        fs::write(place.file(), "the old one").unwrap();
        killed(&mut qemu, &place, point);
        assert_eq!(fs::read_to_string(place.file()).unwrap(), "the old one", "{point:?}");
        match (point, &others(&place)[..]) {
            (Point::Rename, [left]) if left.starts_with(".vm.snap.") && left.ends_with(".part") => {}
            (point, others) => assert_eq!(others, [""; 0], "{point:?}"),
        }
        // The next one succeeds, and puts back what the killed one could not.
        let again = capture(&qemu, &place.file(), &["--json"]);
        figures(&again);
        let noted = again.stderr.contains("as a capture that was killed leaves it; it will be turned off");
        assert_eq!(noted, !point.leaves_no_trace(), "{point:?}: {again:?}");
        assert!(!qemu.qmp().capabilities().unwrap().0["background-snapshot"], "{point:?}");
        qemu.set_capabilities(&[("events", false)]).unwrap();
        is_as_before(&mut qemu);
        assert_eq!(others(&place), [""; 0], "{point:?}");
        let status = is_one_instant(&block(&Snapshot::open(place.file()).unwrap(), "pc.ram"), &setup);
        assert!(status.generation >= last, "{point:?}");
        last = status.generation;
        goes_on(&mut qemu);
    }
}
