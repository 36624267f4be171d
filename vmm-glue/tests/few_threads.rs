//! A host that gives no more threads: a restore fails, whichever thread it was, and the guest has not run one instruction.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use common::{PATIENCE, Rig, Signals};
use kvm_ioctls::Kvm;
use testkit::guest::{Oracle, Privilege};
use testkit::{few_threads, require};
use uffd_engine::{Handlers, StartError};
use vmm_glue::{
    Backing, Host, MachineConfig, RestoreError, RestoreOptions, SaveOptions, SavedVm, Vm, resume_on_demand, save,
};

/// The vCPU's, a fault handler, a loader, and the supervisor.
const THREADS: u64 = 4;

fn no_thread(error: &RestoreError) -> bool {
    let (RestoreError::Threads(error) | RestoreError::Engine(StartError::System { error, .. })) = error else {
        panic!("{error}");
    };
    error.raw_os_error() == Some(libc::EAGAIN)
}

#[test]
fn nothing_runs_then() {
    require!(Root, Kvm, Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let rig = Rig::boot(Privilege::Kernel, MachineConfig::full(1), Backing::Anonymous, 250);
    rig.step();
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
    // Another user is to read it.
    for (path, mode) in [(dir.path(), 0o755), (&path, 0o644)] {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    let saved = SavedVm::open(&path, &kvm, &host).unwrap();
    let options = RestoreOptions::default();
    for threads in 0..=THREADS {
        for at_once in [false, true] {
            let bus = Arc::new(Signals::default());
            let devices = || Arc::clone(&bus) as _;
            let restored: Result<Vm, _> = few_threads(threads, || {
                let one = |engine: uffd_engine::Builder| engine.handlers(Handlers::threads(1));
                if at_once {
                    resume_on_demand(&path, &kvm, &host, devices(), &options, one)
                } else {
                    saved.restore_on_demand(&kvm, &host, devices(), &options, one)
                }
            });
            match restored {
                Err(error) => {
                    assert!(threads < THREADS && no_thread(&error), "{threads}: {error}");
                    assert!(bus.take().is_empty(), "{threads}: it ran");
                }
                Ok(vm) => {
                    assert_eq!(threads, THREADS);
                    vm.wait_stopped(PATIENCE).unwrap();
                    assert_eq!(bus.take().len(), 1);
                    assert!(vm.wait_complete(PATIENCE).unwrap());
                    let mut oracle: Oracle = rig.oracle.clone();
                    let mut walker = rig.walkers[0].clone();
                    oracle.advance(0, &mut walker, rig.image.report(vm.vcpus().ram().memory(), 0).counter);
                    oracle.compare(vm.vcpus().ram().memory()).unwrap();
                }
            }
        }
    }
}
