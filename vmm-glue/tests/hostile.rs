//! The device state of a file can be walked by anybody, and a damaged one is an error, whatever it says.

mod common;

use std::os::unix::fs::FileExt;

use common::Rig;
use kvm_ioctls::Kvm;
use mapped_ram::Snapshot;
use testkit::guest::Privilege;
use testkit::require;
use vmm_glue::{Backing, Host, MachineConfig, MachineState, RestoreError, SaveOptions, SavedVm};

#[test]
fn generic_tools_can_walk_the_device_state() {
    require!(Kvm);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let host = Host::probe(&Kvm::new().unwrap()).unwrap();
    let rig = Rig::boot(Privilege::User, MachineConfig::full(2), Backing::Memfd, 20);
    rig.step();
    vmm_glue::save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
    let state = rig.vcpus.save_state(&host).unwrap();

    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.configuration().machine, "vmm-glue");
    assert!(snapshot.warnings().is_empty(), "{:?}", snapshot.warnings());
    let described: Vec<_> =
        snapshot.vmdesc().unwrap().devices().iter().map(|device| (&*device.name, device.instance)).collect();
    assert_eq!(described, [("vm-memory", 0), ("kvm-vm", 0), ("kvm-vcpu", 0), ("kvm-vcpu", 1)]);
    for (id, vcpu) in (0..).zip(&state.vcpus) {
        let device = snapshot.device("kvm-vcpu", id).unwrap().unwrap();
        let value = device.decode().unwrap();
        let field = |of: &str, name: &str| value.field(of).unwrap().field(name).unwrap().as_u64().unwrap();
        assert_eq!(field("regs", "rip"), vcpu.regs.rip);
        assert_eq!(field("regs", "r8"), 20, "the guest's counter");
        assert_eq!(field("sregs", "cr3"), vcpu.sregs.cr3);
        let mut bytes = Vec::new();
        value.encode(&mut bytes);
        assert_eq!(bytes, device.body(), "the fields are all there is");
    }
    let mut loaded = MachineState::load(&snapshot).unwrap();
    // The clocks have gone on.
    loaded.vm = state.vm.clone();
    common::assert_same_state(&loaded, &state);
}

#[test]
fn damaged_state_is_an_error_and_no_panic() {
    require!(Kvm);
    let dir = tempfile::tempdir().unwrap();
    let (path, damaged) = (dir.path().join("guest.mr"), dir.path().join("damaged.mr"));
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let rig = Rig::boot(Privilege::User, MachineConfig::full(2), Backing::Memfd, 20);
    rig.step();
    vmm_glue::save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
    let tail = Snapshot::open(&path).unwrap().tail();
    std::fs::copy(&path, &damaged).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&damaged).unwrap();
    let length = tail.end.0 - tail.start.0;
    let mut refused = 0;
    for round in 0..600u64 {
        // Another byte each time, all over the state and its description.
        let at = tail.start.0 + (round * 7919 + round * round) % length;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << (round % 8))], at).unwrap();
        match SavedVm::open(&damaged, &kvm, &host) {
            Ok(_) => {}
            Err(RestoreError::Open(_) | RestoreError::State(_)) => refused += 1,
            Err(other) => panic!("{other}"),
        }
        file.write_all_at(&byte, at).unwrap();
    }
    assert!(refused > 100, "{refused} of 600 were refused");
    SavedVm::open(&damaged, &kvm, &host).unwrap();
}

/// Whatever a file lacks would be that of a new machine: it is refused.
#[test]
fn state_that_contradicts_itself_is_refused() {
    require!(Kvm);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.mr");
    let kvm = Kvm::new().unwrap();
    let host = Host::probe(&kvm).unwrap();
    let rig = Rig::boot(Privilege::User, MachineConfig::full(2), Backing::Memfd, 20);
    rig.step();
    let state = rig.vcpus.save_state(&host).unwrap();
    vmm_glue::save(&rig.vcpus, &host, &path, &SaveOptions::default()).unwrap();
    let blueprint = |from: &Snapshot| {
        let value = from.device("vm-memory", 0).unwrap().unwrap();
        let pieces = value.decode().unwrap().field("pieces").unwrap().as_u64s().unwrap();
        vmstate::Section::builder("vm-memory", 0, 1).u64s("pieces", &pieces).build().unwrap()
    };
    let original = Snapshot::open(&path).unwrap();
    let opened = |change: &dyn Fn(&mut MachineState)| {
        let mut state = state.clone();
        change(&mut state);
        let mut devices = vmstate::DeviceWriter::new(2);
        devices.push(blueprint(&original));
        state.sections().unwrap().into_iter().for_each(|section| devices.push(section));
        let path = dir.path().join("changed.mr");
        let layout = original.layout().clone();
        let writer = mapped_ram::Writer::create(&path, original.configuration(), layout).unwrap();
        writer.finish(&devices.finish("vmm-glue").unwrap()).unwrap();
        SavedVm::open(&path, &kvm, &host).map(drop).map_err(|error| error.to_string())
    };
    opened(&|_| ()).unwrap();
    for (change, words) in [
        (
            &(|state: &mut MachineState| state.vcpus[1].lapic = None) as &dyn Fn(&mut MachineState),
            "vCPU 1 has no local",
        ),
        (&|state: &mut MachineState| (state.vm.interrupts, state.vm.pit) = (None, None), "no I/O APIC"),
        (
            &|state: &mut MachineState| {
                state.vm.interrupts = None;
                state.vcpus.iter_mut().for_each(|vcpu| vcpu.lapic = None);
            },
            "no interrupt controllers",
        ),
        (
            &|state: &mut MachineState| state.vm.interrupts.as_mut().unwrap().ioapic.truncate(100),
            "\"ioapic\" of 100 bytes instead of 512",
        ),
        (&|state: &mut MachineState| state.vcpus.clear(), "without vCPUs"),
    ] {
        let error = opened(change).unwrap_err();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_snapshot_of_another_machine_is_refused_by_name() {
    require!(Kvm);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.mr");
    let configuration = vmstate::Configuration::new("pc-q35-10.0");
    let block = page_units::RamBlock::new("pc.ram", page_units::ByteLen(1 << 20), page_units::PageSize::SMALL);
    let layout = page_units::Layout::new(vec![block.unwrap()]).unwrap();
    let writer = mapped_ram::Writer::create(&path, &configuration, layout).unwrap();
    writer.finish(&vmstate::DeviceWriter::new(2).finish("pc-q35-10.0").unwrap()).unwrap();
    let kvm = Kvm::new().unwrap();
    let error = SavedVm::open(&path, &kvm, &Host::probe(&kvm).unwrap()).unwrap_err().to_string();
    assert!(error.contains("kvm-vm") && error.contains("pc-q35-10.0"), "{error}");
}
