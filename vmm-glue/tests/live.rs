//! Snapshots of guests that write to all of their memory at full speed: each is the freeze point, exactly.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::live::{self, Kind};
use common::{PATIENCE, VARIANTS};
use kvm_ioctls::Kvm;
use page_units::ByteLen;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};
use testkit::guest::{GuestConfig, Pattern, Privilege};
use testkit::require;
use vm_memory::{Bytes, GuestAddress};
use vmm_glue::{
    Backing, Discard, FreezeOptions, Handlers, Host, LiveEvent, LiveOptions, MachineConfig, MachineState, snapshot_live,
};

/// Where files are quick to write, if there is such a place.
fn directory() -> tempfile::TempDir {
    let shm = PathBuf::from("/dev/shm");
    tempfile::tempdir_in(if shm.is_dir() { shm } else { std::env::temp_dir() }).unwrap()
}

#[test]
fn a_hundred_snapshots_under_load_are_their_freeze_points_exactly() {
    require!(Kvm, Userfaultfd);
    let dir = directory();
    let path = dir.path().join("live.mr");
    let mut kinds = Vec::new();
    for (number, (privilege, vcpus)) in VARIANTS.into_iter().enumerate() {
        let mut patterns = [Pattern::Stride(1), Pattern::Random];
        patterns.rotate_left(number / 2);
        for (pattern, backing) in patterns.into_iter().zip([Backing::Anonymous, Backing::Memfd]) {
            kinds.push(Kind { privilege, vcpus, pattern, backing, mib: 64, filled: 25 });
        }
    }
    let each = 100_usize.div_ceil(kinds.len());
    let mut faults = 0;
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    for kind in kinds {
        let (vcpus, image, bus) = live::boot(&kind, MachineConfig::bare(kind.vcpus));
        vcpus.resume();
        for round in 0..each {
            live::progress(&vcpus, &image, random.random_range(1..200));
            let report = live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
            assert!(report.stored.0 > 0, "{kind:?}, round {round}: {report:?}");
            faults += report.stats.write_faults + report.stats.hole_faults;
        }
        live::finish(&vcpus, &image, &bus, &kind);
    }
    assert!(faults > 100, "{faults} faults: the guests hardly ran while they were saved");
}

#[test]
fn a_guest_in_huge_pages_is_saved_while_it_runs() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = testkit::hugepages::Overcommit::reserve(64).unwrap();
    let dir = directory();
    let path = dir.path().join("live.mr");
    for (privilege, vcpus) in VARIANTS {
        for pattern in [Pattern::Stride(1), Pattern::Random] {
            let kind = Kind { privilege, vcpus, pattern, backing: Backing::Hugetlb, mib: 64, filled: 1 };
            let (vcpus, image, bus) = live::boot(&kind, MachineConfig::bare(kind.vcpus));
            vcpus.resume();
            for pool in [32, 4] {
                live::progress(&vcpus, &image, 100);
                let freeze = FreezeOptions::default().with_pool(ByteLen(pool << 20));
                live::snapshot(&vcpus, &path, &LiveOptions::default().with_freeze(freeze)).unwrap();
            }
            live::finish(&vcpus, &image, &bus, &kind);
        }
    }
}

#[test]
fn a_tiny_pool_and_several_handlers_lose_nothing() {
    require!(Kvm, Userfaultfd);
    let dir = directory();
    let path = dir.path().join("live.mr");
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let kind =
            Kind { privilege: Privilege::User, vcpus: 2, pattern: Pattern::Random, backing, mib: 32, filled: 50 };
        let (vcpus, image, bus) = live::boot(&kind, MachineConfig::bare(kind.vcpus));
        vcpus.resume();
        for (pages, threads) in [(1, 1), (1, 3), (5, 2), (64, 2)] {
            live::progress(&vcpus, &image, 100);
            let freeze =
                FreezeOptions::default().with_pool(ByteLen(pages << 12)).with_handlers(Handlers::threads(threads));
            live::snapshot(&vcpus, &path, &LiveOptions::default().with_freeze(freeze)).unwrap();
        }
        live::finish(&vcpus, &image, &bus, &kind);
    }
}

#[test]
fn snapshots_of_snapshots_are_exact_for_five_generations() {
    require!(Kvm, Userfaultfd);
    let dir = directory();
    for (privilege, vcpus, machine) in
        [(Privilege::Kernel, 1, MachineConfig::bare(1)), (Privilege::User, 2, MachineConfig::full(2))]
    {
        let kind =
            Kind { privilege, vcpus, pattern: Pattern::Random, backing: Backing::Anonymous, mib: 32, filled: 30 };
        let config = GuestConfig { privilege, vcpus: u8::try_from(vcpus).unwrap() };
        let mut path = dir.path().join("generation-0.mr");
        {
            let (vcpus, image, _) = live::boot(&kind, machine);
            vcpus.resume();
            live::progress(&vcpus, &image, 500);
            live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
        }
        let host = Host::probe(&Kvm::new().unwrap()).unwrap();
        let backings = [Backing::Memfd, Backing::Anonymous];
        for generation in 1..=5usize {
            let on_demand = generation % 2 == 1;
            let (vm, image, bus) = live::restore(&path, backings[generation % 2], config, on_demand);
            vm.resume();
            live::progress(vm.vcpus(), &image, 500);
            let last = std::mem::replace(&mut path, dir.path().join(format!("generation-{generation}.mr")));
            // Half of them are still being loaded.
            let copy = live::Copy::over(live::content_of(&last));
            let options = copy.options(LiveOptions::default());
            let report = vm.snapshot_live(&host, &path, &options).unwrap().wait().unwrap();
            assert!(report.blackout.total > Duration::ZERO && report.took > report.blackout.total, "{report:?}");
            live::assert_same(&live::content_of(&path), &copy.take());
            // The original goes on as well as its copies.
            live::finish(vm.vcpus(), &image, &bus, &kind);
        }
        let (vm, image, bus) = live::restore(&path, Backing::Anonymous, config, false);
        live::finish(vm.vcpus(), &image, &bus, &kind);
    }
}

#[test]
fn writes_of_device_models_are_caught() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = testkit::hugepages::Overcommit::reserve(16).unwrap();
    let dir = directory();
    let path = dir.path().join("live.mr");
    for backing in [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb] {
        let kind =
            Kind { privilege: Privilege::User, vcpus: 1, pattern: Pattern::Stride(1), backing, mib: 16, filled: 50 };
        let (vcpus, image, _) = live::boot(&kind, MachineConfig::bare(1));
        let page = GuestAddress(image.window_to_physical(image.window_len() - 4096));
        let still = Arc::new(Mutex::new(false));
        let written = Arc::new(AtomicU64::new(0));
        let end = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _end = EndOnDrop(&end);
            // A device model: it writes the same number all over its page, except while it is to stand still.
            scope.spawn(|| {
                while !end.load(Ordering::Acquire) {
                    let still = still.lock();
                    if !*still {
                        let bytes = (written.load(Ordering::Relaxed) + 1).to_le_bytes().repeat(512);
                        vcpus.ram().memory().write_slice(&bytes, page).unwrap();
                        written.fetch_add(1, Ordering::Release);
                    }
                    drop(still);
                    std::thread::yield_now();
                }
            });
            let host = Host::probe(&Kvm::new().unwrap()).unwrap();
            for round in 0..10 {
                vcpus.resume();
                live::progress(&vcpus, &image, 100);
                // Every other time nobody else writes.
                let alone = round % 2 == 0;
                if alone {
                    vcpus.pause(PATIENCE).unwrap();
                }
                let taken = Arc::new(Mutex::new(Vec::new()));
                let (stop, go, copy) = (Arc::clone(&still), Arc::clone(&still), Arc::clone(&taken));
                let writes = Arc::clone(&written);
                let options = LiveOptions::default()
                    .with_drain(move |ram| {
                        *stop.lock() = true;
                        *copy.lock() = live::copy_of(ram);
                        Ok(())
                    })
                    .with_observer(move |event| {
                        let LiveEvent::FreezePoint { blackout } = event else { return };
                        assert!(*blackout > Duration::ZERO);
                        let before = writes.load(Ordering::Acquire);
                        *go.lock() = false;
                        // It writes, and nothing is saved yet.
                        while writes.load(Ordering::Acquire) == before {
                            std::thread::yield_now();
                        }
                    });
                let report = snapshot_live(&vcpus, &host, &path, &options).unwrap().wait().unwrap();
                live::assert_same(&live::content_of(&path), &taken.lock());
                let faults = report.stats.write_faults;
                assert!(if alone { faults == 1 } else { faults > 0 }, "{backing:?}, round {round}: {report:?}");
            }
        });
    }
}

/// Tells a thread to end, also when the test fails.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A balloon while a snapshot is taken: the snapshot has what was there, and then the memory is given back.
#[test]
fn discards_are_held_off_while_memory_is_frozen() {
    require!(Kvm, Userfaultfd);
    let dir = directory();
    let path = dir.path().join("live.mr");
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let kind =
            Kind { privilege: Privilege::User, vcpus: 1, pattern: Pattern::Random, backing, mib: 16, filled: 50 };
        let (vcpus, image, bus) = live::boot(&kind, MachineConfig::bare(1));
        let ram = Arc::clone(vcpus.ram());
        // A page of no vCPU, with something in it.
        let page = GuestAddress(image.window_to_physical(image.window_len() - 4096));
        let at = page_units::GuestAddr(page.0);
        let content = || {
            let mut bytes = [0; 4096];
            ram.memory().read_slice(&mut bytes, page).unwrap();
            bytes
        };
        let before = content();
        ram.memory().write_slice(&[7; 4096], page).unwrap();
        vcpus.resume();
        live::progress(&vcpus, &image, 100);
        let copy = Arc::new(Mutex::new(Vec::new()));
        let (taken, balloon) = (Arc::clone(&copy), Arc::clone(&ram));
        let options = LiveOptions::default()
            .with_drain(move |ram| {
                *taken.lock() = live::copy_of(ram);
                Ok(())
            })
            .with_observer(move |event| {
                let LiveEvent::FreezePoint { .. } = event else { return };
                assert_eq!(balloon.discard(at, ByteLen(4096)).unwrap(), Discard::HeldOff);
            });
        let host = Host::probe(&Kvm::new().unwrap()).unwrap();
        snapshot_live(&vcpus, &host, &path, &options).unwrap().wait().unwrap();
        live::assert_same(&live::content_of(&path), &copy.lock());
        assert!(content().iter().all(|&byte| byte == 0), "given back in the end");

        ram.memory().write_slice(&[7; 4096], page).unwrap();
        assert_eq!(ram.discard(at, ByteLen(4096)).unwrap(), Discard::Done);
        assert!(content().iter().all(|&byte| byte == 0));
        for (guest, length) in [(at.0, 0), (at.0 + 1, 4096), (at.0, 100), (1 << 40, 4096), (0, 1 << 40)] {
            let error = ram.discard(page_units::GuestAddr(guest), ByteLen(length)).unwrap_err();
            assert!(error.to_string().contains("can't be given back"), "{error}");
        }
        // What the guest's own oracle expects there.
        ram.memory().write_slice(&before, page).unwrap();
        live::finish(&vcpus, &image, &bus, &kind);
    }
}

/// I/O that comes to its end while the guest is stopped for a snapshot raises an interrupt: both are in it.
#[test]
fn interrupts_of_what_was_drained_are_in_the_state() {
    require!(Kvm, Userfaultfd);
    const LINE: u32 = 10;
    let dir = directory();
    let path = dir.path().join("live.mr");
    let kind = Kind {
        privilege: Privilege::User,
        vcpus: 1,
        pattern: Pattern::Random,
        backing: Backing::Anonymous,
        mib: 16,
        filled: 25,
    };
    let (vcpus, image, bus) = live::boot(&kind, MachineConfig::full(1));
    vcpus.resume();
    live::progress(&vcpus, &image, 100);
    let vcpus = Arc::new(vcpus);
    for raised in [false, true] {
        let machine = Arc::clone(&vcpus);
        let options = LiveOptions::default()
            .with_drain(move |_| machine.vm().set_irq_line(LINE, raised).map_err(|error| error.to_string()));
        let host = Host::probe(&Kvm::new().unwrap()).unwrap();
        snapshot_live(&vcpus, &host, &path, &options).unwrap().wait().unwrap();
        let state = MachineState::load(&mapped_ram::Snapshot::open(&path).unwrap()).unwrap();
        let chips = state.vm.interrupts.unwrap();
        // `struct kvm_ioapic_state`: base, ioregsel, id, and then what is requested.
        let requested = u32::from_le_bytes(chips.ioapic[16..20].try_into().unwrap());
        assert_eq!(requested >> LINE & 1 == 1, raised, "{requested:#x}");
    }
    live::finish(&vcpus, &image, &bus, &kind);
}

#[test]
fn a_guest_that_stands_still_stays_so() {
    require!(Kvm, Userfaultfd);
    let dir = directory();
    let path = dir.path().join("live.mr");
    let kind = Kind {
        privilege: Privilege::Kernel,
        vcpus: 2,
        pattern: Pattern::Stride(1),
        backing: Backing::Anonymous,
        mib: 16,
        filled: 50,
    };
    let (vcpus, image, bus) = live::boot(&kind, MachineConfig::bare(2));
    vcpus.resume();
    live::progress(&vcpus, &image, 100);
    vcpus.pause(PATIENCE).unwrap();
    let before = live::copy_of(vcpus.ram());
    live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
    live::assert_same(&live::content_of(&path), &before);
    live::assert_same(&live::copy_of(vcpus.ram()), &before);
    // Somebody else stops it in the middle: that stands.
    vcpus.resume();
    let stop = vcpus.stop_handle();
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let options = LiveOptions::default().with_drain(move |_| {
        stop.stop();
        Ok(())
    });
    let snapshot = snapshot_live(&vcpus, &host, &path, &options).unwrap();
    vcpus.wait_stopped(PATIENCE).unwrap();
    let before = live::copy_of(vcpus.ram());
    snapshot.wait().unwrap();
    live::assert_same(&live::copy_of(vcpus.ram()), &before);
    live::assert_same(&live::content_of(&path), &before);
    vcpus.resume();
    live::progress(&vcpus, &image, 100);
    live::finish(&vcpus, &image, &bus, &kind);
}

#[test]
fn what_is_still_loading_is_saved_at_once() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = testkit::hugepages::Overcommit::reserve(64).unwrap();
    let dir = directory();
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let mut from_source = 0;
    let mut random = StdRng::seed_from_u64(testkit::seed::seed());
    for ((privilege, vcpus), backing) in
        VARIANTS.into_iter().zip([Backing::Anonymous, Backing::Memfd, Backing::Hugetlb].into_iter().cycle())
    {
        let path = dir.path().join("live.mr");
        let kind =
            Kind { privilege, vcpus, pattern: Pattern::Random, backing: Backing::Anonymous, mib: 64, filled: 50 };
        let (vcpus, image, _) = live::boot(&kind, MachineConfig::bare(vcpus));
        vcpus.resume();
        live::progress(&vcpus, &image, 100);
        live::snapshot(&vcpus, &path, &LiveOptions::default()).unwrap();
        drop(vcpus);

        let (vm, bus) = live::loading(&path, backing);
        // One after the other, each over what the last one showed.
        for round in 0..3 {
            live::progress(vm.vcpus(), &image, random.random_range(1..200));
            let next = dir.path().join(format!("next-{round}.mr"));
            let copy = live::Copy::over(live::content_of(&path));
            let snapshot = vm.snapshot_live(&host, &next, &copy.options(LiveOptions::default())).unwrap();
            if round == 1 {
                // It is given up, and the guest goes on.
                snapshot.cancel();
                assert!(snapshot.wait().is_err() && !next.exists());
                continue;
            }
            let report = snapshot.wait().unwrap();
            from_source += report.stats.pages_from_source;
            live::assert_same(&live::content_of(&next), &copy.take());
        }
        // A restored one goes on from there, and so does the original.
        let (other, other_bus) = live::loading(&dir.path().join("next-2.mr"), Backing::Anonymous);
        live::progress(other.vcpus(), &image, 100);
        other.engine().unwrap().resume_background();
        assert!(other.wait_complete(PATIENCE).unwrap());
        live::finish(other.vcpus(), &image, &other_bus, &kind);
        vm.engine().unwrap().resume_background();
        assert!(vm.wait_complete(PATIENCE).unwrap());
        live::finish(vm.vcpus(), &image, &bus, &kind);
    }
    assert!(from_source > 1000, "{from_source} pages were taken from the source");
}

#[test]
fn a_guest_that_ends_meanwhile_is_saved_all_the_same() {
    require!(Kvm, Userfaultfd);
    let dir = directory();
    let path = dir.path().join("live.mr");
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let kind =
            Kind { privilege: Privilege::User, vcpus: 2, pattern: Pattern::Random, backing, mib: 32, filled: 50 };
        let (vcpus, image, _) = live::boot(&kind, MachineConfig::bare(2));
        vcpus.resume();
        live::progress(&vcpus, &image, 100);
        let host = Host::probe(&Kvm::new().unwrap()).unwrap();
        let copy = live::Copy::default();
        // A pool so small that vCPUs wait for it when they are told to end.
        let freeze = FreezeOptions::default().with_pool(ByteLen(4096));
        let options = copy.options(LiveOptions::default().with_freeze(freeze));
        let snapshot = snapshot_live(&vcpus, &host, &path, &options).unwrap();
        drop(vcpus);
        snapshot.wait().unwrap();
        live::assert_same(&live::content_of(&path), &copy.take());
        let (vm, image, bus) = live::restore(&path, backing, image.config(), false);
        live::finish(vm.vcpus(), &image, &bus, &kind);
    }
}
