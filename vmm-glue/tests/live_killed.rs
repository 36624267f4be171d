//! A process that is killed in the middle of a live snapshot: nothing half-written is ever taken for a snapshot.

mod common;

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::live::{self, Kind};
use kvm_ioctls::Kvm;
use mapped_ram::Snapshot;
use nix::sys::signal::{Signal, raise};
use page_units::BlockId;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use testkit::at_call::{Call, Is};
use testkit::guest::GuestConfig;
use testkit::require;
use vmm_glue::{Backing, Host, LiveEvent, LiveOptions, snapshot_live};

/// All pages are written, and the file is made a whole: the kernel kills at the call that would begin each step.
const FINISHING: [&str; 7] = ["ram end", "bitmap 0", "bitmap 1", "sync", "link", "rename", "sync name"];

fn host() -> Host {
    Host::probe(&Kvm::new().unwrap()).unwrap()
}

/// The call that begins a step of the end. `other` is a finished file of the same machine.
fn call_of(step: &str, path: &Path, other: &Snapshot) -> Call {
    let writes = |at| Call::any_of(&[libc::SYS_pwrite64]).with(3, Is::Equal(at));
    let syncs = |is: fn(u64) -> Is| Call::any_of(&[libc::SYS_fsync]).with(0, is(unpublished(path)));
    let bitmap = |block| writes(other.block(BlockId(block)).unwrap().bitmap_offset.0);
    match step {
        "ram end" => {
            let end = |(id, block): (u32, &page_units::RamBlock)| {
                other.block(BlockId(id)).unwrap().pages_offset.0 + block.length().0
            };
            writes((0..).zip(other.layout().blocks()).map(end).max().unwrap())
        }
        "bitmap 0" => bitmap(0),
        "bitmap 1" => bitmap(1),
        "sync" => syncs(Is::Equal),
        "link" => Call::any_of(&[libc::SYS_linkat]),
        "rename" => Call::any_of(&[libc::SYS_rename, libc::SYS_renameat, libc::SYS_renameat2]),
        "sync name" => syncs(Is::Not),
        other => panic!("{other}"),
    }
}

/// The file that will have this name, as it was opened first: it has the lowest number.
fn unpublished(path: &Path) -> u64 {
    let directory = path.parent().unwrap();
    let open = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let ours = |fd: &PathBuf| std::fs::read_link(fd).is_ok_and(|to| to.starts_with(directory));
    open.filter(ours).map(|fd| fd.file_name().unwrap().to_str().unwrap().parse().unwrap()).min().unwrap()
}

/// Does nothing by itself: the test starts this program again with a role for it.
#[test]
fn victim() {
    if let (Ok(point), Some(path)) = (std::env::var("LIVE_POINT"), std::env::var_os("LIVE_PATH")) {
        killed(Path::new(&path), &point);
    }
}

/// Takes a snapshot, leaves a copy of what it should be in `copy`, and is killed.
fn killed(path: &Path, point: &str) {
    let die = || raise(Signal::SIGKILL).unwrap();
    let (vcpus, _, _) = live::running(&Kind::SMALL);
    let copied = path.with_extension("copy");
    let stopped = point == "stopped";
    let mut options = LiveOptions::default().with_drain(move |ram| {
        let mut file = std::fs::File::create(&copied).unwrap();
        live::copy_of(ram).iter().for_each(|block| file.write_all(block).unwrap());
        if stopped {
            die();
        }
        Ok(())
    });
    if FINISHING.contains(&point) {
        let file = tempfile::NamedTempFile::new().unwrap();
        snapshot_live(&vcpus, &host(), file.path(), &LiveOptions::default()).unwrap().wait().unwrap();
        let other = Snapshot::open(file.path()).unwrap();
        // Nobody would remove it later.
        drop(file);
        let (path, point) = (path.to_owned(), point.to_owned());
        options = options.with_observer(move |event| {
            let LiveEvent::FreezePoint { .. } = event else { return };
            // The thread that saves is about to be started by this one.
            call_of(&point, &path, &other).kills_this_thread();
        });
    }
    let snapshot = snapshot_live(&vcpus, &host(), path, &options).unwrap();
    let total = snapshot.progress().total.0;
    match point {
        "frozen" => {}
        "saved" => live::saved(&snapshot, total),
        "published" => drop(snapshot.wait().unwrap()),
        point if FINISHING.contains(&point) => {
            let outcome = snapshot.wait();
            panic!("{point}: {outcome:?}");
        }
        pages => live::saved(&snapshot, total * pages.parse::<u64>().unwrap() / 1000),
    }
    die();
}

/// Starts this program again to be killed; answers by what.
fn victim_of(point: &str, path: &Path) -> Option<i32> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "victim", "--nocapture"]).env("LIVE_POINT", point).env("LIVE_PATH", path);
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.signal().is_some(), "point {point}: {errors}");
    output.status.signal()
}

#[test]
fn killed_at_twenty_points() {
    require!(Kvm, Userfaultfd);
    let mut points: Vec<String> = ["stopped", "frozen", "saved", "published"].map(String::from).into();
    points.extend(FINISHING.map(String::from));
    // Thousandths of all pages.
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    points.extend((points.len()..20).map(|_| random.random_range(0..1000).to_string()));
    let mut complete = 0;
    for (number, point) in points.iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("live.mr");
        let before = number % 2 == 1;
        if before {
            std::fs::write(&path, "the one before").unwrap();
        }
        let finishing = FINISHING.contains(&point.as_str());
        let signal = if finishing { libc::SIGSYS } else { libc::SIGKILL };
        assert_eq!(victim_of(point, &path), Some(signal), "point {point}");
        let mut others: Vec<_> = live::names(dir.path()).into_iter().filter(|name| name != "live.copy").collect();
        if point == "rename" {
            // It had a name for that moment, which is nobody's.
            let left = others.iter().position(|name| name.starts_with(".live.mr.") && name.ends_with(".part"));
            others.remove(left.unwrap());
        }
        assert!(others.is_empty() || others == ["live.mr"], "point {point}: {others:?}");
        let found = std::fs::read(&path).ok();
        let named = match (&found, before) {
            (None, false) => false,
            (found, true) if found.as_deref() == Some(b"the one before") => false,
            _ => true,
        };
        if finishing || point == "published" {
            assert_eq!(named, matches!(point.as_str(), "sync name" | "published"), "point {point}");
        }
        if !named {
            continue;
        }
        complete += 1;
        let copy = std::fs::read(path.with_extension("copy")).unwrap();
        assert!(live::content_of(&path).concat() == copy, "point {point}: a file that is not the freeze point");
        // And a guest goes on from it.
        let config = GuestConfig { privilege: Kind::SMALL.privilege, vcpus: 1 };
        let (vm, image, bus) = live::restore(&path, Backing::Anonymous, config, true);
        live::finish(vm.vcpus(), &image, &bus, &Kind::SMALL);
    }
    assert!((2..points.len()).contains(&complete), "{complete} of {} files were complete", points.len());
}

/// What a killed process leaves under a temporary name goes away with the next snapshot.
#[test]
fn what_was_left_behind_goes_away() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    assert_eq!(victim_of("rename", &path), Some(libc::SIGSYS));
    assert_eq!(live::names(dir.path()).len(), 2, "the copy, and a file without its name");
    let (vcpus, image, bus) = live::running(&Kind::SMALL);
    live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
    let mut names = live::names(dir.path());
    names.sort();
    assert_eq!(names, ["live.copy", "live.mr"]);
    live::finish(&vcpus, &image, &bus, &Kind::SMALL);
}
