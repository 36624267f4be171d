//! A conversation between two real QEMUs, recorded here and now, through both sides of our codec.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;

use qemu_pages::wire::return_path::Message;
use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Machine, Qemu, Setup};

use crate::MIB;

#[path = "../../../../page-source/qemu/tests/postcopy/codec.rs"]
mod codec;

/// Copies one direction of a connection, and keeps a copy.
fn copy(mut from: UnixStream, mut to: UnixStream, kept: Arc<Mutex<Vec<u8>>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut some = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut some) {
            kept.lock().unwrap().extend_from_slice(&some[..n]);
            if to.write_all(&some[..n]).is_err() {
                break;
            }
        }
        // The other side may be gone already.
        let _ = to.shutdown(std::net::Shutdown::Write);
    })
}

/// Passes `connections` connections on to `to`. What went there and back on each.
fn pass_on(door: UnixListener, to: std::path::PathBuf, connections: usize) -> thread::JoinHandle<Vec<[Vec<u8>; 2]>> {
    thread::spawn(move || {
        let mut open = Vec::new();
        for _ in 0..connections {
            let (near, far) = (door.accept().unwrap().0, UnixStream::connect(&to).unwrap());
            let kept = [Arc::<Mutex<Vec<u8>>>::default(), Arc::default()];
            let there = copy(near.try_clone().unwrap(), far.try_clone().unwrap(), Arc::clone(&kept[0]));
            let back = copy(far, near, Arc::clone(&kept[1]));
            open.push((kept, [there, back]));
        }
        let ended = open.into_iter().map(|(kept, threads)| {
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            kept.map(|bytes| std::mem::take(&mut *bytes.lock().unwrap()))
        });
        ended.collect()
    })
}

fn records(preempt: bool) {
    let setup = Setup::new(Machine::Pc, 64);
    let plan = Plan::check(60 * MIB);
    let mut source = Qemu::start(&setup, &plan.build()).unwrap();
    source.wait_ready().unwrap();
    let mut destination = Qemu::start(&setup.waiting(), &plan.build()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (near, far) = (dir.path().join("near"), dir.path().join("far"));
    let uri = |path: &std::path::Path| json!({"uri": format!("unix:{}", path.display())});
    for qemu in [&mut source, &mut destination] {
        qemu.set_capabilities(&[("postcopy-ram", true), ("postcopy-preempt", preempt), ("events", true)]).unwrap();
    }
    let door = UnixListener::bind(&near).unwrap();
    destination.execute("migrate-incoming", uri(&far)).unwrap();
    let conversation = pass_on(door, far, 1 + usize::from(preempt));
    source
        .execute("migrate-set-parameters", json!({"max-bandwidth": MIB, "max-postcopy-bandwidth": 64 * MIB}))
        .unwrap();
    source.execute("migrate", uri(&near)).unwrap();
    source.wait_migration("active").unwrap();
    source.execute("migrate-start-postcopy", json!({})).unwrap();
    source.wait_migration("completed").unwrap();
    let (passes, errors) = destination.order('?').unwrap();
    assert!(passes > 0 && errors == 0);
    drop((source, destination));

    let conversation = conversation.join().unwrap();
    let mut sent = codec::Sent::default();
    sent.main(&conversation[0][0]);
    if preempt {
        sent.fast(&conversation[1][0]);
    }
    assert!(sent.data > 10_000 && sent.zeros > 1000, "{} and {}", sent.data, sent.zeros);
    let messages = codec::back(&conversation[0][1]);
    assert!(messages.iter().any(|message| matches!(message, Message::Request { .. })));
    assert_eq!(messages.back(), Some(&Message::Shut(0)));
    // What QEMU's source sent last of each page is what the pattern says, where the guest does not write.
    let mut compared = 0;
    for ((block, page), bytes) in &sent.pages {
        let address = page * 4096;
        if block == "pc.ram" && plan.is_stored(address) {
            let right = bytes.chunks(8).zip(0..).all(|(word, i)| *word == Plan::word(address + 8 * i).to_le_bytes());
            assert!(right, "{address:#x}");
            compared += 1;
        }
    }
    assert!(compared > 10_000);
}

#[test]
fn the_wire_between_two_qemus_is_recorded() {
    testkit::require!(Qemu, Userfaultfd);
    records(false);
}

#[test]
fn the_wire_between_two_qemus_with_preempt_is_recorded() {
    testkit::require!(Qemu, Userfaultfd);
    records(true);
}
