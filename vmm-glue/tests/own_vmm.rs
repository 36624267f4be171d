//! A VMM with its own vCPU threads (that of the example), saved, saved while it runs, and restored: all memory compared.

mod common;
#[path = "../examples/own_vmm/save.rs"]
mod save;
#[path = "../examples/own_vmm/vcpus.rs"]
mod vcpus;
#[path = "../examples/own_vmm/vmm.rs"]
mod vmm;

use std::sync::Arc;

use common::live::{self, Copy};
use common::{PATIENCE, specs};
use kvm_ioctls::Kvm;
use save::{Memory, adopt, restore};
use testkit::guest::{GuestConfig, GuestImage, Oracle, Privilege, Program, Walker};
use testkit::require;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::Vmm;
use vmm_glue::{
    GuestRam, Host, LiveError, LiveOptions, Machine, SaveError, SaveOptions, StopError, snapshot_live,
    snapshot_live_loading,
};

const VCPUS: u8 = 2;

/// A guest that writes to all of its memory, again and again, and what plain Rust says of it.
struct Guest {
    vmm: Vmm,
    image: GuestImage,
    oracle: Oracle,
    programs: Vec<Program>,
}

fn memory() -> Memory {
    let ranges = specs().iter().flat_map(|spec| spec.pieces().to_vec()).collect::<Vec<_>>();
    let mut ranges: Vec<_> = ranges.iter().map(|(at, len)| (GuestAddress(at.0), len.get())).collect();
    ranges.sort_unstable();
    Memory::from_ranges(&ranges).unwrap()
}

fn boot(kvm: &Kvm) -> Guest {
    let ram = adopt(memory()).unwrap();
    let config = GuestConfig { privilege: Privilege::User, vcpus: VCPUS };
    let image = GuestImage::build(ram.memory(), config);
    testkit::guest::fill_pages(ram.memory(), &image, 25, 7);
    let mut programs = common::programs(&image, 20, 1000);
    for (vcpu, program) in (0..).zip(&mut programs) {
        program.steps = u64::MAX;
        image.write_program(ram.memory(), vcpu, program);
    }
    let oracle = Oracle::capture(&image, ram.memory());
    let vmm = Vmm::new(kvm, ram, None, VCPUS.into(), |_, vcpus| {
        (0..).zip(vcpus).for_each(|(number, vcpu)| image.boot_vcpu(kvm, vcpu, number));
        Ok(())
    });
    Guest { vmm: vmm.unwrap(), image, oracle, programs }
}

/// Waits until its console has `bytes` more.
fn goes_on(vmm: &Vmm, bytes: usize) {
    let goal = vmm.shared.lock().console.len() + bytes;
    vmm.shared.wait(|state| (state.console.len() >= goal).then_some(()));
}

/// Lets a guest that stands still come to an end soon, and compares everything with the oracle.
fn finish(guest: &Guest, vmm: &Vmm) {
    let (memory, mut oracle) = (vmm.ram.memory(), guest.oracle.clone());
    let ends = (0..).zip(&guest.programs).map(|(vcpu, program)| {
        let program = Program { steps: guest.image.report(memory, vcpu).counter + 100, ..*program };
        guest.image.write_program(memory, vcpu, &program);
        oracle.write_program(vcpu, &program);
        program
    });
    let ends: Vec<_> = ends.collect();
    vmm.run();
    vmm.shared.wait(|state| (state.off == usize::from(VCPUS)).then_some(()));
    vmm.stop(PATIENCE).unwrap();
    for (vcpu, program) in (0..).zip(ends) {
        oracle.advance(vcpu, &mut Walker::new(program), u64::MAX);
    }
    oracle.compare(memory).unwrap();
}

#[test]
fn a_vmm_with_its_own_vcpus_is_saved_and_restored() {
    require!(Kvm, Userfaultfd);
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (running, standing) = (dir.path().join("live.mr"), dir.path().join("saved.mr"));
    let guest = boot(&kvm);
    guest.vmm.run();
    for _ in 0..5 {
        goes_on(&guest.vmm, 3);
        let copy = Copy::default();
        let live = snapshot_live(&guest.vmm, &host, &running, &copy.options(LiveOptions::default())).unwrap();
        goes_on(&guest.vmm, 3);
        live.wait().unwrap();
        live::assert_same(&live::content_of(&running), &copy.take());
    }
    // It stays as it is when it was saved.
    vmm_glue::save(&guest.vmm, &host, &standing, &SaveOptions::default()).unwrap();
    live::assert_same(&live::content_of(&standing), &live::copy_of(&guest.vmm.ram));
    let console = guest.vmm.shared.lock().console.clone();
    for path in [standing, running] {
        let again = restore(&path, &kvm, &host).unwrap();
        assert!(console.starts_with(&again.shared.lock().console));
        let engine = again.engine.as_ref().unwrap();
        engine.wait_for(PATIENCE).unwrap().unwrap();
        // Byte for byte, before it runs.
        live::assert_same(&live::copy_of(&again.ram), &live::content_of(&path));
        // On demand, too; and saved while it is loading.
        drop(again);
        let again = restore(&path, &kvm, &host).unwrap();
        let copy = Copy::over(live::content_of(&path));
        let (third, options) = (dir.path().join("third.mr"), copy.options(LiveOptions::default()));
        again.run();
        let engine = again.engine.as_ref().unwrap();
        snapshot_live_loading(&again, engine, &host, &third, &options).unwrap().wait().unwrap();
        live::assert_same(&live::content_of(&third), &copy.take());
        again.stop(PATIENCE).unwrap();
        finish(&guest, &again);
    }
    finish(&guest, &guest.vmm);
}

#[test]
fn device_sections_that_nobody_claims_are_refused_by_name() {
    require!(Kvm);
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("saved.mr");
    let guest = boot(&kvm);
    vmm_glue::save(&guest.vmm, &host, &path, &SaveOptions::default()).unwrap();
    let error = vmm_glue::SavedVm::open(&path, &kvm, &host).unwrap_err();
    assert!(error.to_string().contains("device \"tiny-console\" (instance 0)"), "{error}");
    // What it needs of the host is asked all the same.
    let snapshot = mapped_ram::Snapshot::open(&path).unwrap();
    assert_eq!(vmm_glue::host_check(&snapshot).unwrap(), []);
}

#[test]
fn a_vmm_that_does_not_stop_in_time_goes_on_and_there_is_no_file() {
    require!(Kvm, Userfaultfd);
    /// Its vCPUs never stop.
    struct Stubborn(Arc<GuestRam>);
    impl Machine for Stubborn {
        fn ram(&self) -> &Arc<GuestRam> {
            &self.0
        }
        fn hold(&self, limit: std::time::Duration) -> Result<Box<dyn vmm_glue::Held + '_>, StopError> {
            Err(StopError::Timeout { vcpus: vec![3], limit })
        }
    }
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("live.mr");
    let machine = Stubborn(adopt(memory()).unwrap());
    let error = snapshot_live(&machine, &host, &path, &LiveOptions::default()).unwrap_err();
    assert!(matches!(error, LiveError::Stop(StopError::Timeout { .. })), "{error}");
    let error = vmm_glue::save(&machine, &host, &path, &SaveOptions::default()).unwrap_err();
    assert!(matches!(error, SaveError::Stop(StopError::Timeout { .. })), "{error}");
    assert_eq!(live::names(dir.path()), [""; 0]);
}

/// Writes through our handle are noted in the VMM's bitmap, whatever type it has.
#[test]
fn what_is_written_to_adopted_memory_is_noted_in_its_bitmap() {
    let theirs = memory();
    let ram = adopt(theirs.clone()).unwrap();
    let dirty = || -> Vec<u64> {
        let regions = theirs.iter();
        let pages = regions.flat_map(|region| {
            let pages = (0..region.size()).step_by(4096).filter(|&at| region.bitmap().dirty_at(at));
            pages.map(|at| vm_memory::GuestMemoryRegion::start_addr(region).0 + at as u64).collect::<Vec<_>>()
        });
        pages.collect()
    };
    assert_eq!(dirty(), [0; 0]);
    ram.memory().write_obj(7u64, GuestAddress(0x5008)).unwrap();
    ram.memory().write_slice(&[1; 8192], GuestAddress((1 << 32) + 0x1f00)).unwrap();
    let high = 1u64 << 32;
    assert_eq!(dirty(), [0x5000, high + 0x1000, high + 0x2000, high + 0x3000]);
    // Mapped for as long as anybody has it.
    drop(theirs);
    let memory = ram.memory().clone();
    drop(ram);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x5008)).unwrap(), 7);
}
