//! Devices that one side has and the other has not.

use testkit_qemu::guest::Plan;
use testkit_qemu::{Machine, Setup};

use crate::MIB;
use crate::refuse::{refused, refused_with};
use crate::support::{How, Saved};

fn with(bare: &Setup, arguments: &str) -> Setup {
    Setup { extra: arguments.split_whitespace().map(str::to_owned).collect(), ..bare.clone() }
}

/// Refused in both directions: missing in QEMU, and missing in the snapshot.
fn refused_both_ways(bare: &Setup, arguments: &str, words: &[&str]) {
    let plan = Plan::check(16 * MIB);
    let more = with(bare, arguments);
    for (saved, loading, what) in [(&more, bare, "missing"), (bare, &more, "no state")] {
        let saved = Saved::new(saved, &plan, How::default());
        refused(&saved, loading, &[words, &[what]].concat());
    }
}

#[test]
fn a_device_that_differs_on_pci_is_refused() {
    testkit::require!(Qemu);
    let bare = Setup::new(Machine::Pc, 64);
    refused_both_ways(&bare, "-device virtio-rng-pci", &["0000:00:02.0"]);
    // The other one of the same bus.
    let saved = Saved::new(&with(&bare, "-device virtio-rng-pci"), &Plan::check(16 * MIB), How::default());
    let other = with(&bare, "-device virtio-balloon-pci");
    refused(&saved, &other, &["0000:00:02.0", "virtio-rng", "virtio-balloon"]);
}

#[test]
fn a_device_that_differs_behind_a_bridge_is_refused() {
    testkit::require!(Qemu);
    let bridge = "-device pcie-root-port,id=r,chassis=1,addr=5.0";
    let bare = with(&Setup::new(Machine::Q35, 64), bridge);
    let plan = Plan::check(16 * MIB);
    let more = with(&bare, &format!("{bridge} -device virtio-rng-pci,bus=r"));
    let saved = Saved::new(&more, &plan, How::default());
    refused(&saved, &bare, &["missing", "0000:00:05.0:00.0", "virtio-rng"]);
    refused(&Saved::new(&bare, &plan, How::default()), &more, &["no state", "0000:00:05.0:00.0"]);
}

/// The second root bus, and the third, which has no name, are told apart.
#[test]
fn on_pci_on_other_root_buses() {
    testkit::require!(Qemu, Userfaultfd);
    let plan = Plan::check(16 * MIB);
    let pcie = "-device pxb-pcie,bus=pcie.0,addr=8,bus_nr=128,id=q -device pcie-root-port,bus=q,id=s,chassis=2 \
        -device pxb-pcie,bus=pcie.0,addr=9,bus_nr=64 -device pcie-root-port,bus=pxb-pcie-bus.0,id=y,chassis=3";
    let pci = "-device pxb,bus=pci.0,addr=8,bus_nr=128,id=s -device pxb,bus=pci.0,addr=9,bus_nr=64,id=y";
    for (machine, buses) in [(Machine::Q35, pcie), (Machine::Pc, pci)] {
        let bare = with(&Setup::new(machine, 64), buses);
        let rng_on = |bus: &str| with(&bare, &format!("{buses} -device virtio-rng-pci,bus={bus},addr=0"));
        let (on_s, on_y) = (Saved::new(&rng_on("s"), &plan, How::default()), rng_on("y"));
        refused(&on_s, &bare, &["missing", "0000:80:08.0:00.0:00.0", "virtio-rng"]);
        refused(&on_s, &on_y, &["missing", "0000:80:08.0:00.0:00.0"]);
        refused(&Saved::new(&bare, &plan, How::default()), &on_y, &["no state", "0000:40:09.0:00.0:00.0"]);
        let another = buses.replace("128", "130");
        refused(
            &on_s,
            &with(&bare, &format!("{another} -device virtio-rng-pci,bus=s,addr=0")),
            &["missing", "0000:80:08.0:00.0"],
        );
        // The same ones fit.
        for saved in [on_s, Saved::new(&on_y, &plan, How::default())] {
            let mut qemu = saved.waiting(&saved.setup);
            let ended = saved.load(&qemu, &[]);
            assert!(!ended.stderr.contains("not compared"), "{ended:?}");
            assert_eq!(ended.figures()["state"], "running");
            saved.is_whole(&mut qemu);
        }
    }
}

#[test]
fn a_device_that_differs_on_isa_is_refused() {
    testkit::require!(Qemu);
    let parallel = "-chardev null,id=p -device isa-parallel,chardev=p";
    refused_both_ways(&Setup::new(Machine::Pc, 64), parallel, &["isa-parallel"]);
}

#[test]
fn a_device_that_differs_on_usb_is_refused() {
    testkit::require!(Qemu);
    let bare = with(&Setup::new(Machine::Pc, 64), "-device piix3-usb-uhci,id=u");
    refused_both_ways(&bare, "-device piix3-usb-uhci,id=u -device usb-tablet,bus=u.0", &["usb-tablet"]);
}

#[test]
fn a_device_that_differs_on_virtio_mmio_is_refused() {
    testkit::require!(Qemu);
    refused_both_ways(&Setup::new(Machine::Microvm, 64), "-device virtio-rng-device", &["virtio-rng-device"]);
}

/// What is compared raises no false alarm: devices of all kinds, behind bridges, on two root buses, and without state.
#[test]
fn the_same_ones_fit() {
    testkit::require!(Qemu, Userfaultfd);
    let pc = "-vga std -device pci-testdev -device edu -device isa-debug-exit -device i82801b11-bridge,id=b \
        -chardev null,id=p -device isa-parallel,chardev=p -chardev null,id=s -device isa-serial,chardev=s -device isa-fdc,iobase=0x370 \
        -device piix3-usb-uhci,id=u -device usb-hub,bus=u.0,port=1 -device usb-tablet,bus=u.0,port=1.1 \
        -device usb-kbd,bus=u.0,port=2 -device qemu-xhci,id=x -blockdev null-co,node-name=d,read-zeroes=on \
        -device usb-storage,drive=d,bus=x.0 -device pxb,bus_nr=128,id=q -device virtio-rng-pci,bus=q,addr=3";
    let q35 = "-device pcie-root-port,id=r,chassis=1 -device virtio-rng-pci,bus=r -device virtio-keyboard-pci -device pvpanic-pci \
        -device pxb-pcie,bus_nr=128,id=q -device pcie-root-port,bus=q,id=s,chassis=2 -device virtio-rng-pci,bus=s";
    let microvm = "-device virtio-rng-device -device virtio-balloon-device -device virtio-serial-device \
        -device virtio-keyboard-device";
    for (machine, arguments) in [(Machine::Pc, pc), (Machine::Q35, q35), (Machine::Microvm, microvm)] {
        let setup = with(&Setup::new(machine, 64), arguments);
        let saved = Saved::new(&setup, &Plan::check(16 * MIB), How::default());
        // A USB controller writes into memory while the machine runs.
        let mut qemu = saved.waiting(&setup);
        let figures = saved.load(&qemu, &["--paused"]).figures();
        assert_eq!(figures["state"], "paused", "{figures}");
        saved.is_whole(&mut qemu);
    }
}

/// Not everything can be compared beforehand: what QEMU finds out itself ends it, before its guest was started.
#[test]
fn that_only_qemu_misses() {
    testkit::require!(Qemu, Userfaultfd);
    let controller = "-device virtio-scsi-pci -blockdev null-co,node-name=d,read-zeroes=on";
    let bare = with(&Setup::new(Machine::Pc, 64), controller);
    let more = with(&bare, &format!("{controller} -device scsi-hd,drive=d"));
    let saved = Saved::new(&more, &Plan::check(16 * MIB), How::default());
    let mut qemu = saved.waiting(&bare);
    let ended = saved.load(&qemu, &[]);
    let error = ended.error();
    assert!(error.contains("standard error") && !error.contains("--recover"), "{error}");
    assert!(!qemu.wait_exit().unwrap().success());
    // QEMU 10 names the section, QEMU 11 does not.
    assert!(qemu.stderr().contains("scsi-disk") || qemu.stderr().contains("loadvm failed"), "{}", qemu.stderr());
    let ended = saved.load(&qemu, &["--recover"]);
    assert!(ended.error().contains("QMP socket"), "{ended:?}");
}

/// There is a way round a comparison that is wrong: of the devices, and of nothing else.
#[test]
fn the_comparison_can_be_skipped() {
    testkit::require!(Qemu, Userfaultfd);
    let skip: &[&str] = &["--skip-device-check"];
    let bare = Setup::new(Machine::Pc, 64);
    let more = with(&bare, "-device virtio-rng-pci");
    let saved = Saved::new(&bare, &Plan::check(16 * MIB), How::default());
    // One without state, as far as QEMU knows.
    refused(&saved, &more, &["no state", skip[0]]);
    saved.loads_into(&more, skip);
    // What else differs is refused as ever.
    let others = [
        (with(&Setup::new(Machine::Q35, 64), "-device virtio-rng-pci"), "-machine"),
        (Setup { megabytes: 128, ..more.clone() }, "pc.ram"),
        (Setup { cpus: 2, ..more.clone() }, "-smp 1"),
        (with(&bare, "-device e1000"), "e1000.rom"),
    ];
    for (other, word) in others {
        refused_with(&saved, &other, skip, &[word]);
    }
    // One that is really missing is found by QEMU.
    let saved = Saved::new(&more, &Plan::check(16 * MIB), How::default());
    refused(&saved, &bare, &["missing", skip[0]]);
    let mut qemu = saved.waiting(&bare);
    let ended = saved.load(&qemu, skip);
    assert!(ended.error().contains("standard error"), "{ended:?}");
    assert!(!qemu.wait_exit().unwrap().success());
}
