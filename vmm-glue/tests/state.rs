//! State goes from one VM to another and is the same there.

mod common;

use std::sync::Arc;

use common::{Rig, VARIANTS};
use kvm_ioctls::Kvm;
use testkit::guest::{GuestImage, Privilege};
use testkit::require;
use vm_memory::{Bytes, GuestAddress};
use vmm_glue::{Backing, Bus, GuestRam, Host, MachineConfig, MachineState, NewVm, VcpuOptions, Vcpus};

/// A second machine with a copy of the first one's memory and state.
fn clone_of(rig: &Rig, state: &MachineState, host: &Host) -> Rig {
    let ram = Arc::new(GuestRam::allocate(&common::specs(), Backing::Anonymous).unwrap());
    let mut page = [0; 4096];
    for piece in rig.ram.pieces() {
        for at in (piece.guest.0..).step_by(4096).take(usize::try_from(piece.run.pages.0).unwrap()) {
            rig.ram.memory().read_slice(&mut page, GuestAddress(at)).unwrap();
            ram.memory().write_slice(&page, GuestAddress(at)).unwrap();
        }
    }
    let machine = NewVm::new(&Kvm::new().unwrap(), Arc::clone(&ram), MachineConfig::of(state)).unwrap();
    let bus = Arc::new(common::Signals::default());
    let options = VcpuOptions::default().paused();
    let vcpus = Vcpus::start(machine, Arc::clone(&bus) as Arc<dyn Bus>, options).unwrap();
    vcpus.restore_state(state, host).unwrap();
    let image = GuestImage::found(ram.memory(), rig.image.config());
    Rig { image, ram, bus, vcpus, oracle: rig.oracle.clone(), walkers: rig.walkers.clone() }
}

#[test]
fn a_guest_goes_on_in_another_vm_where_it_stopped() {
    require!(Kvm);
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    for (privilege, vcpus) in VARIANTS {
        for config in [MachineConfig::bare(vcpus), MachineConfig::full(vcpus)] {
            let mut rig = Rig::boot(privilege, config, Backing::Memfd, 300);
            rig.step();
            let state = rig.vcpus.save_state(&host).unwrap();
            host.check(&Kvm::new().unwrap(), &state).unwrap();
            let mut copy = clone_of(&rig, &state, &host);
            copy.finish();
            rig.finish();
        }
    }
}

#[test]
fn what_is_restored_is_saved_again() {
    require!(Kvm);
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let rig = Rig::boot(Privilege::User, MachineConfig::full(2), Backing::Memfd, 50);
    rig.step();
    let state = rig.vcpus.save_state(&host).unwrap();
    let copy = clone_of(&rig, &state, &host);
    let again = copy.vcpus.save_state(&host).unwrap();
    common::assert_same_state(&state, &again);
}
