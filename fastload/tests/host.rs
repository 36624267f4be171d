//! `fastload check --host`: what a snapshot needs and this host lacks, of a real vCPU's state.

use std::path::Path;
use std::process::{Command, Output};

use kvm_ioctls::Kvm;
use mapped_ram::{Snapshot, Writer};
use page_units::{BlockId, ByteLen, Layout, PageIndex, PageRun, PageSize, RamBlock};
use serde_json::Value;
use testkit::{require, samples};
use vmm_glue::{Host, MachineState};
use vmstate::{Configuration, DeviceWriter};

fn fastload(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fastload")).args(words).output().unwrap()
}

/// The state of a vCPU that was given all that this host has.
fn state() -> MachineState {
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
    MachineState::save(&vm, &[&vcpu], &Host::probe(&kvm).unwrap(), true, false).unwrap()
}

fn write(state: &MachineState, path: &Path) {
    let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(1 << 20), PageSize::SMALL).unwrap()]).unwrap();
    let mut devices = DeviceWriter::new(2);
    state.sections().unwrap().into_iter().for_each(|section| devices.push(section));
    let writer = Writer::create(path, &Configuration::new("m"), layout).unwrap();
    writer.write(PageRun::single(BlockId(0), PageIndex(7)), &[1; 4096]).unwrap();
    writer.finish(&devices.finish("m").unwrap()).unwrap();
}

fn host(path: &Path) -> (Option<i32>, Value) {
    let output = fastload(&["check", "--host", path.to_str().unwrap(), "--json"]);
    let first = output.stdout.split(|byte| *byte == b'\n').next().unwrap();
    (output.status.code(), serde_json::from_slice(first).unwrap_or_else(|_| panic!("{output:?}")))
}

#[test]
fn what_this_host_lacks_is_a_table_and_an_exit_code() {
    require!(Kvm);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let mut state = state();
    write(&state, &path);
    let (code, found) = host(&path);
    assert_eq!((code, &found["fits"], &found["needs"]), (Some(0), &true.into(), &serde_json::json!([])));
    let output = fastload(&["check", "--host", path.to_str().unwrap()]);
    assert!(String::from_utf8(output.stdout).unwrap().contains("this host has all that it needs"));

    // A CPUID bit that no processor has, an MSR that none knows.
    let leaf = state.vcpus[0].cpuid.iter_mut().find(|entry| entry.function == 7 && entry.index == 1).map(|leaf| {
        let bit = (0..32).rev().find(|bit| leaf.ecx >> bit & 1 == 0).unwrap();
        leaf.ecx |= 1 << bit;
    });
    state.vcpus[0].msrs.push((0x1234_5678, 1));
    write(&state, &path);
    let (code, found) = host(&path);
    let needs = found["needs"].as_array().unwrap();
    let of = |kind: &str| needs.iter().filter(|need| need["kind"] == kind && need["here"] == false).count();
    assert_eq!((code, &found["fits"]), (Some(1), &false.into()), "{found}");
    assert_eq!((of("cpuid"), of("msr")), (usize::from(leaf.is_some()), 1), "{found}");
    let output = fastload(&["check", "--host", path.to_str().unwrap()]);
    let (table, error) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(table.contains("MSR 0x12345678") && table.contains("can't run here"), "{table}");
    assert!(error.contains("this host lacks") && error.lines().count() == 1, "{error}");
    assert!(Snapshot::open(&path).is_ok());
}

#[test]
fn a_qemu_tells_whether_it_knows_the_machine_and_the_devices() {
    require!(Qemu);
    let dir = tempfile::tempdir().unwrap();
    let sample = samples::stripped().into_iter().find(|s| s.name == "q10-q35-32-virtio-nodriver.mr").unwrap();
    let path = sample.unpack(dir.path()).unwrap();
    let path = path.to_str().unwrap();
    let output = fastload(&["check", "--host", path, "--qemu", "qemu-system-x86_64", "--json"]);
    let first = output.stdout.split(|byte| *byte == b'\n').next().unwrap();
    let found: Value = serde_json::from_slice(first).unwrap();
    let needs = found["needs"].as_array().unwrap();
    assert_eq!((output.status.code(), &found["fits"]), (Some(0), &true.into()), "{found}");
    let known = |kind: &str| needs.iter().filter(|need| need["kind"] == kind && need["here"] == true).count();
    assert!(known("machine") == 1 && known("device") >= 1, "{found}");
    // One that knows neither.
    let other = dir.path().join("qemu");
    std::fs::write(&other, "#!/bin/sh\necho 'pc Standard PC'\n").unwrap();
    std::fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = fastload(&["check", "--host", path, "--qemu", other.to_str().unwrap()]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.contains("machine type pc-q35-10.0"), "{error}");
    // One that is none.
    let output = fastload(&["check", "--host", path, "--qemu", "/nonexistent/qemu"]);
    assert!(output.status.code() == Some(1));
}
