//! A VMM that locks all its memory (mlockall): pages are there before the snapshot's, and the guest would find zeros.

mod common;

use std::sync::Arc;

use common::{PATIENCE, Rig, Signals};
use kvm_ioctls::Kvm;
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use testkit::guest::Privilege;
use testkit::hugepages::Overcommit;
use testkit::require;
use vmm_glue::{Backing, Host, MachineConfig, RestoreOptions, SaveOptions, SavedVm, save};

#[test]
fn it_is_refused_on_demand_and_works_eagerly() {
    require!(Root, Kvm, Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(6).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let rig = Rig::boot(Privilege::Kernel, MachineConfig::full(1), Backing::Anonymous, 250);
    rig.step();
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
    let saved = SavedVm::open(&path, &kvm, &host).unwrap();
    for backing in [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb] {
        let options = RestoreOptions::default().with_backing(backing).paused();
        let bus = || Arc::new(Signals::default()) as _;
        mlockall(MlockAllFlags::MCL_FUTURE).unwrap();
        let on_demand = saved.restore_on_demand(&kvm, &host, bus(), &options, |engine| engine);
        let eagerly = saved.restore_eager(&kvm, &host, bus(), &options);
        munlockall().unwrap();
        let error = on_demand.err().unwrap().to_string();
        assert!(error.contains("mlockall"), "{backing:?}: {error}");
        let vm = eagerly.unwrap();
        vm.wait_stopped(PATIENCE).unwrap();
        let (mut oracle, mut walker) = (rig.oracle.clone(), rig.walkers[0].clone());
        oracle.advance(0, &mut walker, rig.image.report(rig.ram.memory(), 0).counter);
        oracle.compare(vm.vcpus().ram().memory()).unwrap();
    }
}
