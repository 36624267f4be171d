//! Files that `fastload` wrote, in QEMU's own loader (`-incoming file:`) and in ours.

use std::path::Path;
use std::time::Duration;

use serde_json::json;
use testkit_qemu::guest::Plan;
use testkit_qemu::{Fastload, Machine, Qemu, Setup};

use crate::MIB;
use crate::support::{How, Saved};

fn fastload(arguments: &[&str], files: &[&Path]) {
    let files = files.iter().map(|file| file.as_os_str());
    let ended = Fastload::start(arguments.iter().map(std::ffi::OsStr::new).chain(files)).unwrap().finish().unwrap();
    assert!(ended.status.success(), "{arguments:?}: {ended:?}");
}

/// QEMU loads the file all by itself; then we do.
fn loads_both_ways(saved: &Saved) {
    fastload(&["check"], &[&saved.file]);
    for multifd in [false, true] {
        let mut qemu = saved.waiting(&saved.setup);
        qemu.set_capabilities(&[("mapped-ram", true), ("multifd", multifd)]).unwrap();
        qemu.execute("migrate-incoming", json!({"uri": format!("file:{}", saved.file.display())})).unwrap();
        let resumed = qemu.qmp().wait_event(&["RESUME"], Duration::from_secs(30)).unwrap();
        assert!(resumed.is_some(), "{}", qemu.stderr());
        qemu.set_capabilities(&[("mapped-ram", false), ("multifd", false)]).unwrap();
        saved.is_whole(&mut qemu);
    }
    saved.loads_into(&saved.setup, &[]);
}

#[test]
fn qemu_loads_converted_files() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup { cpus: 2, virtio: true, ..Setup::new(Machine::Q35, 64) };
    let plan = Plan { cpus: 2, ..Plan::check(60 * MIB) };
    let mut saved = Saved::new(&setup, &plan, How::default());
    let dir = tempfile::tempdir().unwrap();
    let (original, flat) = (saved.file.clone(), dir.path().join("flat"));
    let (again, from_flat) = (dir.path().join("again"), dir.path().join("from-flat"));
    fastload(&["convert"], &[&original, &again]);
    fastload(&["convert", "--to", "flat"], &[&original, &flat]);
    fastload(&["convert", "--template"], &[&original, &flat, &from_flat]);
    for file in [again, from_flat] {
        saved.file = file;
        loads_both_ways(&saved);
    }
}

#[test]
fn a_background_snapshot_without_bitmaps_is_repaired() {
    testkit::require!(Qemu, Userfaultfd);
    let setup = Setup::new(Machine::Pc, 64);
    let plan = Plan::check(60 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let (broken, repaired) = (dir.path().join("broken"), dir.path().join("repaired"));
    let mut qemu = Qemu::start(&setup, &plan.build()).unwrap();
    qemu.wait_ready().unwrap();
    let (passes, _) = qemu.order('s').unwrap();
    // QEMU (10.0) tries it out on its memory, and now and then finds for no reason that it does not work.
    let mut attempt = || {
        let capabilities = [("background-snapshot", true), ("mapped-ram", true), ("events", true)];
        qemu.set_capabilities(&capabilities)?;
        qemu.execute("migrate", json!({"uri": format!("file:{}", broken.display())}))?;
        qemu.wait_migration("completed")
    };
    let attempts: Vec<_> = (0..100).map(|_| attempt()).take_while(Result::is_err).collect();
    assert!(attempts.len() < 100, "{:?}", attempts.last());
    let ram = qemu.dump().unwrap();
    let mut saved = Saved::of(&setup, broken.clone(), ram, passes, dir);
    let refused = saved.load(&saved.waiting(&setup), &[]);
    assert!(refused.error().contains("repair"), "{refused:?}");
    fastload(&["repair"], &[&broken, &repaired]);
    saved.file = repaired;
    loads_both_ways(&saved);
}
