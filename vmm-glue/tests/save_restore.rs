//! A guest at work is saved into a file, and goes on in fresh VMs where it stopped; all memory is compared.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::{PATIENCE, Rig, Signals, VARIANTS};
use kvm_ioctls::Kvm;
use testkit::guest::{GuestConfig, GuestImage, Oracle, Privilege, Walker};
use testkit::require;
use uffd_engine::{Background, Builder, Handlers};
use vmm_glue::{
    Backing, Host, MachineConfig, Mode, RestoreError, RestoreOptions, SaveError, SaveOptions, SavedVm, VcpuOptions, Vm,
    resume_on_demand,
};

/// The other side of a restore.
struct Restored {
    vm: Vm,
    image: GuestImage,
    bus: Arc<Signals>,
    oracle: Oracle,
    walkers: Vec<Walker>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Eager,
    OnDemand,
    /// Nothing comes but what is touched, until the guest is done.
    OnDemandAlone,
    /// In one call, with the vCPUs bound to cores, and running when it returns.
    AtOnce,
}

fn restore(rig: &Rig, path: &Path, backing: Backing, how: How) -> Restored {
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let saved = SavedVm::open(path, &kvm, &host).unwrap();
    let bus = Arc::new(Signals::default());
    let options = RestoreOptions::default().with_backing(backing).paused();
    let background = if how == How::OnDemandAlone { Background::default().paused() } else { Background::default() };
    let vm = match how {
        How::Eager => saved.restore_eager(&kvm, &host, Arc::clone(&bus) as _, &options),
        How::AtOnce => {
            let options = RestoreOptions::default().with_backing(backing);
            let cores = std::thread::available_parallelism().unwrap().get();
            let options = options.with_vcpus(VcpuOptions::default().with_cores(vec![0, cores - 1]));
            resume_on_demand(path, &kvm, &host, Arc::clone(&bus) as _, &options, |engine| engine)
        }
        _ => saved.restore_on_demand(&kvm, &host, Arc::clone(&bus) as _, &options, |engine: Builder| {
            engine.background(background).handlers(Handlers::threads(2))
        }),
    }
    .unwrap();
    // So that all are at the same step.
    vm.vcpus().wait_stopped(PATIENCE).unwrap();
    let image = GuestImage::found(vm.vcpus().ram().memory(), rig.image.config());
    Restored { vm, image, bus, oracle: rig.oracle.clone(), walkers: rig.walkers.clone() }
}

impl Restored {
    /// Runs to the end, and compares everything.
    fn finish(&mut self, how: How) {
        let ram = Arc::clone(self.vm.vcpus().ram());
        let GuestConfig { vcpus, .. } = self.image.config();
        let mut done = vec![false; usize::from(vcpus)];
        while done.contains(&false) {
            self.vm.resume();
            self.vm.vcpus().wait_stopped(PATIENCE).unwrap();
            for (vcpu, signal) in self.bus.take() {
                match signal {
                    testkit::guest::Signal::Progress => {}
                    testkit::guest::Signal::Done => done[usize::try_from(vcpu).unwrap()] = true,
                    other => panic!("{other:?} on vCPU {vcpu}"),
                }
            }
        }
        if let Some(engine) = self.vm.engine() {
            if how == How::OnDemandAlone {
                assert!(engine.stats().demand_faults > 0, "{:?}", engine.stats());
                engine.resume_background();
            }
            assert!(self.vm.wait_complete(PATIENCE).unwrap());
        }
        for (vcpu, walker) in (0..).zip(&mut self.walkers) {
            self.oracle.advance(vcpu, walker, u64::MAX);
            let report = self.image.report(ram.memory(), vcpu);
            assert_eq!((report.counter, report.checksum), (walker.counter(), walker.checksum()), "vCPU {vcpu}");
            let seed = walker.program().seed;
            assert_eq!(report.sse, [seed, !seed], "vCPU {vcpu}");
        }
        self.oracle.compare(ram.memory()).unwrap();
    }
}

fn save(rig: &Rig, path: &Path) -> vmm_glue::Saved {
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    vmm_glue::save(&rig.vcpus, &host, path, &SaveOptions::default()).unwrap()
}

#[test]
fn a_saved_guest_goes_on_eagerly_and_on_demand() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    for (privilege, vcpus) in VARIANTS {
        for (config, backing) in
            [(MachineConfig::bare(vcpus), Backing::Anonymous), (MachineConfig::full(vcpus), Backing::Memfd)]
        {
            let mut rig = Rig::boot(privilege, config, backing, 250);
            rig.step();
            let saved = save(&rig, &path);
            assert!(saved.stored.0 > 500 && saved.zero.0 > 500, "{saved:?}");
            for how in [How::Eager, How::OnDemand, How::OnDemandAlone, How::AtOnce] {
                for backing in [Backing::Anonymous, Backing::Memfd] {
                    let mut restored = restore(&rig, &path, backing, how);
                    if how == How::Eager {
                        assert_eq!(
                            restored.vm.report().mode,
                            Mode::Eager { stored: saved.stored, zero: saved.zero },
                            "what was saved is what was loaded"
                        );
                    }
                    restored.finish(how);
                }
            }
            rig.finish();
        }
    }
}

/// The thread that makes the machine waits for what does not come; it ends with the call.
#[test]
fn a_resume_that_fails_leaves_nothing_behind() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let rig = Rig::boot(Privilege::User, MachineConfig::full(1), Backing::Anonymous, 250);
    rig.step();
    save(&rig, &path);
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let bus = Arc::new(Signals::default());
    let resume = |path: &Path, options: &RestoreOptions| {
        let configure = |engine: Builder| engine.handlers(Handlers::default());
        resume_on_demand(path, &kvm, &host, Arc::clone(&bus) as _, options, configure).map(drop)
    };
    let options = RestoreOptions::default();
    let missing = resume(&dir.path().join("missing"), &options);
    assert!(matches!(missing, Err(RestoreError::Open(_))), "{missing:?}");
    let unbound = VcpuOptions::default().with_cores(vec![1000]);
    let nowhere = resume(&path, &options.clone().with_vcpus(unbound));
    assert!(matches!(nowhere, Err(RestoreError::Threads(_))), "{nowhere:?}");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let cut = resume(&path, &options);
    assert!(matches!(cut, Err(RestoreError::Open(_))), "{cut:?}");
    save(&rig, &path);
    resume(&path, &options).unwrap();
    // An owner of the devices that is left would be a thread that is left.
    assert_eq!(Arc::strong_count(&bus), 1);
}

#[test]
fn a_guest_in_huge_pages_is_restored() {
    require!(Kvm, Userfaultfd, Hugepages);
    let _room = testkit::hugepages::Overcommit::reserve(32).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let mut rig = Rig::boot(Privilege::User, MachineConfig::bare(2), Backing::Hugetlb, 250);
    rig.step();
    save(&rig, &path);
    for how in [How::Eager, How::OnDemand, How::OnDemandAlone, How::AtOnce] {
        restore(&rig, &path, Backing::Hugetlb, how).finish(how);
    }
    rig.finish();
}

#[test]
fn a_guest_kicked_anywhere_is_saved_exactly() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    for (privilege, vcpus) in VARIANTS {
        let mut rig = Rig::boot(privilege, MachineConfig::bare(vcpus), Backing::Memfd, 0);
        // Wherever it is when some of its work is done.
        rig.vcpus.resume();
        while rig.image.report(rig.ram.memory(), 0).counter < 200 {
            std::thread::yield_now();
        }
        save(&rig, &path);
        let frozen = Oracle::capture(&rig.image, rig.ram.memory());
        for how in [How::Eager, How::OnDemandAlone] {
            let mut restored = restore(&rig, &path, Backing::Anonymous, how);
            if how == How::Eager {
                frozen.compare_exactly(restored.vm.vcpus().ram().memory()).unwrap();
            }
            if restored.image.report(restored.vm.vcpus().ram().memory(), 0).state == 2 {
                continue;
            }
            restored.finish_or_done(how);
        }
        rig.finish();
    }
}

impl Restored {
    /// As `finish`, for guests of which some vCPUs may have been done when they were saved.
    fn finish_or_done(&mut self, how: How) {
        let ram = Arc::clone(self.vm.vcpus().ram());
        for vcpu in 0..self.image.config().vcpus {
            while self.image.report(ram.memory(), vcpu).state != 2 {
                self.vm.resume();
                self.vm.vcpus().wait_stopped(PATIENCE).unwrap();
            }
        }
        if let Some(engine) = self.vm.engine() {
            assert!(how != How::OnDemandAlone || engine.stats().demand_faults > 0, "{:?}", engine.stats());
            engine.resume_background();
            assert!(self.vm.wait_complete(PATIENCE).unwrap());
        }
        for (vcpu, walker) in (0..).zip(&mut self.walkers) {
            self.oracle.advance(vcpu, walker, u64::MAX);
        }
        self.oracle.compare(ram.memory()).unwrap();
    }
}

#[test]
fn memory_that_is_still_missing_is_not_saved() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let (path, second) = (dir.path().join("guest.mr"), dir.path().join("second.mr"));
    let mut rig = Rig::boot(Privilege::User, MachineConfig::bare(1), Backing::Memfd, 250);
    rig.step();
    save(&rig, &path);
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let mut restored = restore(&rig, &path, Backing::Memfd, How::OnDemandAlone);
    let early = restored.vm.save(&host, &second, &SaveOptions::default());
    assert!(matches!(early, Err(SaveError::Loading)), "{early:?}");
    assert!(!second.exists());
    // A second generation, once everything is there.
    restored.vm.engine().unwrap().resume_background();
    assert!(restored.vm.wait_complete(PATIENCE).unwrap());
    restored.vm.save(&host, &second, &SaveOptions::default()).unwrap();
    restore(&rig, &second, Backing::Anonymous, How::OnDemand).finish(How::OnDemand);
    restored.finish(How::OnDemand);
    rig.finish();
}

#[test]
fn dropping_a_guest_that_loads_neither_hangs_nor_lies() {
    require!(Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    for (privilege, vcpus) in VARIANTS {
        let mut rig = Rig::boot(privilege, MachineConfig::bare(vcpus), Backing::Memfd, 250);
        rig.step();
        save(&rig, &path);
        let restored = restore(&rig, &path, Backing::Anonymous, How::OnDemandAlone);
        restored.vm.resume();
        let begun = Instant::now();
        drop(restored);
        assert!(begun.elapsed() < PATIENCE);
        rig.finish();
    }
}
