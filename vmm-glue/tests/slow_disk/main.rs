//! Live snapshots to a disk that takes its time, or fails: the guest does not wait for it, and goes on.

#[path = "../common/mod.rs"]
mod common;
mod disk;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::live::{self, Kind};
use common::{PATIENCE, Signals};
use disk::{Failure, SlowDisk};
use kvm_ioctls::Kvm;
use page_source::SinkError;
use page_units::ByteLen;
use parking_lot::Mutex;
use testkit::guest::GuestImage;
use testkit::require;
use vmm_glue::{FreezeOptions, Host, LiveError, LiveOptions, LiveSnapshot, MachineConfig, Vcpus, snapshot_live};

/// How long to wait for a write at a time.
const MOMENT: Duration = Duration::from_millis(1);

struct Rig {
    vcpus: Vcpus,
    image: GuestImage,
    bus: Arc<Signals>,
    /// The memory at the freeze point.
    copy: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Rig {
    fn start() -> Rig {
        let (vcpus, image, bus) = live::boot(&Kind::SMALL, MachineConfig::bare(Kind::SMALL.vcpus));
        vcpus.resume();
        live::progress(&vcpus, &image, 100);
        Rig { vcpus, image, bus, copy: Arc::default() }
    }

    fn snapshot(&self, path: &Path, pool: ByteLen) -> LiveSnapshot {
        self.try_snapshot(path, pool).unwrap()
    }

    fn try_snapshot(&self, path: &Path, pool: ByteLen) -> Result<LiveSnapshot, LiveError> {
        let copy = Arc::clone(&self.copy);
        let freeze = FreezeOptions::default().with_pool(pool);
        let options = LiveOptions::default().with_freeze(freeze).with_drain(move |ram| {
            *copy.lock() = live::copy_of(ram);
            Ok(())
        });
        let host = Host::probe(&Kvm::new().unwrap()).unwrap();
        snapshot_live(&self.vcpus, &host, path, &options)
    }

    /// Takes a snapshot and lets the writes of its beginning pass, when `ready` says so.
    fn begin(&self, disk: &SlowDisk, path: &Path, pool: ByteLen, ready: impl Fn()) -> LiveSnapshot {
        std::thread::scope(|scope| {
            let _whatever_happens = OpenedAtLast(disk);
            let taking = scope.spawn(|| self.snapshot(path, pool));
            while !taking.is_finished() {
                if disk.turnstile.somebody_waits(MOMENT) {
                    ready();
                    disk.turnstile.let_one_pass();
                }
            }
            taking.join().unwrap()
        })
    }

    fn goes_on(&self) {
        live::progress(&self.vcpus, &self.image, 20);
    }
}

/// Should the test fail, nobody waits for ever.
struct OpenedAtLast<'a>(&'a SlowDisk);

impl Drop for OpenedAtLast<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.turnstile.open();
        }
    }
}

/// Lets one write after the other pass, when `ready` says so, until the snapshot is over. Answers how many there were.
fn drive(disk: &SlowDisk, snapshot: &LiveSnapshot, mut ready: impl FnMut()) -> u32 {
    let _whatever_happens = OpenedAtLast(disk);
    let mut writes = 0;
    while !snapshot.wait_for(Duration::ZERO) {
        if disk.turnstile.somebody_waits(MOMENT) {
            ready();
            disk.turnstile.let_one_pass();
            writes += 1;
        }
    }
    writes
}

#[test]
fn the_guest_goes_on_during_every_single_write() {
    require!(Kvm, Userfaultfd, Root, Fuse);
    let disk = SlowDisk::mount();
    let rig = Rig::start();
    let path = disk.path().join("live.mr");
    // Were the guest standing still while anything is written, it would not go on.
    let snapshot = rig.begin(&disk, &path, ByteLen(32 << 20), || rig.goes_on());
    let writes = drive(&disk, &snapshot, || rig.goes_on());
    let report = snapshot.wait().unwrap();
    assert!(writes > 4 && report.stats.waits_for_pool == 0, "{writes} writes, {report:?}");
    assert!(live::content_of(&path) == *rig.copy.lock(), "a file that is not the freeze point");
    live::finish(&rig.vcpus, &rig.image, &rig.bus, &Kind::SMALL);
}

#[test]
fn a_full_pool_makes_the_guest_wait_and_loses_nothing() {
    require!(Kvm, Userfaultfd, Root, Fuse);
    let disk = SlowDisk::mount();
    let rig = Rig::start();
    let path = disk.path().join("live.mr");
    let snapshot = rig.begin(&disk, &path, ByteLen(16 << 12), || ());
    // The first write is held until a writer waits for the pool, and so for the disk.
    let (mut held, begun) = (false, Instant::now());
    drive(&disk, &snapshot, || {
        while !held && snapshot.stats().waits_for_pool == 0 {
            assert!(begun.elapsed() < PATIENCE, "{:?}", snapshot.stats());
            std::thread::yield_now();
        }
        held = true;
    });
    let report = snapshot.wait().unwrap();
    assert!(report.stats.waits_for_pool > 0, "{report:?}");
    assert!(live::content_of(&path) == *rig.copy.lock(), "a file that is not the freeze point");
    rig.goes_on();
    live::finish(&rig.vcpus, &rig.image, &rig.bus, &Kind::SMALL);
}

#[test]
fn cancelled_while_the_disk_holds_a_write() {
    require!(Kvm, Userfaultfd, Root, Fuse);
    let disk = SlowDisk::mount();
    let rig = Rig::start();
    let path = disk.path().join("live.mr");
    let snapshot = rig.begin(&disk, &path, ByteLen(16 << 12), || ());
    let _whatever_happens = OpenedAtLast(&disk);
    while !disk.turnstile.somebody_waits(PATIENCE) {}
    snapshot.cancel();
    // Its memory is let go although the write stands still, a full pool or not.
    for _ in 0..100 {
        rig.goes_on();
    }
    assert!(!snapshot.wait_for(Duration::ZERO));
    disk.turnstile.open();
    assert!(matches!(snapshot.wait(), Err(LiveError::Cancelled)));
    assert_eq!(std::fs::read_dir(disk.path()).unwrap().count(), 0);
    live::finish(&rig.vcpus, &rig.image, &rig.bus, &Kind::SMALL);
}

#[test]
fn a_disk_that_fails_in_the_middle_or_at_the_end() {
    require!(Kvm, Userfaultfd, Root, Fuse);
    let disk = SlowDisk::mount();
    disk.turnstile.open();
    let rig = Rig::start();
    let path = disk.path().join("live.mr");
    let names = || live::names(disk.path());
    let pool = ByteLen(32 << 20);
    for failure in [Failure::WriteAfter(0), Failure::WriteAfter(3), Failure::WriteAfter(7), Failure::Sync] {
        let before = path.exists().then(|| live::content_of(&path));
        disk.turnstile.fail(Some(failure));
        let error = rig.try_snapshot(&path, pool).and_then(LiveSnapshot::wait).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(path.to_str().unwrap()) && text.contains("os error 5"), "{failure:?}: {text}");
        match (failure, &error) {
            (Failure::WriteAfter(0), LiveError::Create(_)) => assert!(text.contains("offset 0"), "{text}"),
            (Failure::WriteAfter(_), LiveError::Write(SinkError::Write { offset, .. })) => {
                assert!(offset.0 > 0 && text.contains(&format!("offset {offset}")), "{text}");
            }
            (Failure::Sync, LiveError::Write(SinkError::File(_))) => assert!(text.contains("durable"), "{text}"),
            (failure, error) => panic!("{failure:?}: {error:?}"),
        }
        // Nothing half-written is there, what was there is, and the guest goes on.
        assert_eq!(names(), if before.is_some() { vec!["live.mr"] } else { vec![] }, "{failure:?}");
        if let Some(before) = before {
            live::assert_same(&live::content_of(&path), &before);
        }
        rig.goes_on();
        disk.turnstile.fail(None);
        rig.snapshot(&path, pool).wait().unwrap();
        live::assert_same(&live::content_of(&path), &rig.copy.lock());
    }
    live::finish(&rig.vcpus, &rig.image, &rig.bus, &Kind::SMALL);
}
