//! Does the QEMU have the devices of the snapshot, and no others? QEMU itself finds out that one is missing when it is
//! too late, and never that one has no state.
//!
//! There is no list of a QEMU's devices by the names of their sections. What is compared: PCI functions by address, and
//! by kind the devices that are always found below `/machine` under a type that has one kind of section.

use std::collections::HashMap;

use fastload_qmp::{Qmp, QmpError};
use mapped_ram::Snapshot;
use serde_json::json;
use vmstate::SectionKind;

use super::pci;

/// Where QEMU keeps the devices of the command line, with and without an id, and the machine's own.
const CONTAINERS: [&str; 3] = ["/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"];

/// Sections of devices on the ISA bus of an x86 machine, and the types of these devices (QEMU 10.0: each device saved
/// once). Types without a section (isa-debugcon, isa-debug-exit, ...) can't be compared.
const ISA: [(&str, &[&str]); 15] = [
    ("serial", &["isa-serial"]),
    ("parallel_isa", &["isa-parallel"]),
    ("fdc", &["isa-fdc"]),
    ("isa-ide", &["isa-ide"]),
    ("ne2000", &["ne2k_isa"]),
    ("sb16", &["sb16"]),
    ("cs4231a", &["cs4231a"]),
    ("gus", &["gus"]),
    ("vga", &["isa-vga"]),
    ("cirrus_vga", &["isa-cirrus-vga"]),
    ("ib700_wdt", &["ib700"]),
    ("hpet", &["hpet"]),
    ("pckbd", &["i8042"]),
    ("vmmouse", &["vmmouse"]),
    ("port92", &["port92"]),
];

/// The same of USB. The sections' names begin with the place of the device.
const USB: [(&str, &[&str]); 6] = [
    ("usb-hub", &["usb-hub"]),
    ("usb-kbd", &["usb-kbd"]),
    ("usb-ptr", &["usb-mouse", "usb-tablet"]),
    ("usb-storage", &["usb-storage", "usb-bot"]),
    ("usb-ccid", &["usb-ccid"]),
    ("usb-host", &["usb-host"]),
];

/// The same of virtio-mmio.
const VIRTIO: [(&str, &[&str]); 8] = [
    ("virtio-net", &["virtio-net-device"]),
    ("virtio-blk", &["virtio-blk-device"]),
    ("virtio-rng", &["virtio-rng-device"]),
    ("virtio-balloon", &["virtio-balloon-device"]),
    ("virtio-console", &["virtio-serial-device"]),
    ("virtio-scsi", &["virtio-scsi-device"]),
    ("virtio-gpu", &["virtio-gpu-device"]),
    (
        "virtio-input",
        &["virtio-keyboard-device", "virtio-mouse-device", "virtio-tablet-device", "virtio-multitouch-device"],
    ),
];

/// Why the devices are not found to be the same.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unlike {
    /// This is wrong with one of them.
    #[error("{0} (--skip-device-check loads it without this comparison)")]
    Device(String),
    /// QEMU could not be asked.
    #[error(transparent)]
    Qmp(#[from] QmpError),
}

impl From<String> for Unlike {
    fn from(what: String) -> Unlike {
        Unlike::Device(what)
    }
}

/// A device as QEMU lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plugged {
    pub(super) kind: String,
    /// Where it is, below `/machine`.
    pub(super) path: String,
}

/// Compares what can be compared.
pub(super) fn compare(qmp: &mut Qmp, snapshot: &Snapshot) -> Result<(), Unlike> {
    let full = snapshot.sections().iter().filter(|section| section.kind == SectionKind::Full);
    let names: Vec<&str> = full.map(|section| section.name.as_str()).collect();
    let plugged = plugged(qmp)?;
    let machine = snapshot.configuration().machine.as_str();
    kinds(&names, &plugged, machine.starts_with("pc-") || machine == "microvm" || machine == "isapc")?;
    pci::compare(qmp, &names, &plugged)
}

/// All devices that QEMU lists.
fn plugged(qmp: &mut Qmp) -> Result<Vec<Plugged>, QmpError> {
    let mut all = Vec::new();
    for container in CONTAINERS {
        let list = match qmp.execute("qom-list", json!({"path": container})) {
            Err(QmpError::Refused { .. }) => continue, // a machine without
            answer => answer?,
        };
        let devices = list.as_array().into_iter().flatten().filter_map(|entry| {
            let kind = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
            Some(Plugged { kind: kind.to_owned(), path: format!("{container}/{}", entry["name"].as_str()?) })
        });
        all.extend(devices);
    }
    Ok(all)
}

/// Compares the number of devices of each kind.
fn kinds(sections: &[&str], plugged: &[Plugged], x86: bool) -> Result<(), String> {
    let mut saved: HashMap<&str, usize> = HashMap::new();
    for section in sections {
        *saved.entry(kind(section)).or_default() += 1;
    }
    let mut now: HashMap<&str, usize> = HashMap::new();
    for device in plugged {
        *now.entry(&device.kind).or_default() += 1;
    }
    let isa = if x86 { &ISA[..] } else { &[] };
    for (section, types) in isa.iter().chain(&USB).chain(&VIRTIO) {
        let saved = saved.get(section).copied().unwrap_or(0);
        let now: usize = types.iter().filter_map(|kind| now.get(kind)).sum();
        let name = types.join(" or ");
        if saved > now {
            return Err(format!(
                "its device {name} is missing in this QEMU (it was saved with {saved}, this QEMU has {now}): start it with the same devices"
            ));
        }
        if saved < now {
            return Err(format!(
                "there is no state for a device {name} that this QEMU has (it was saved with {saved}, this QEMU has {now}): start it with the same devices"
            ));
        }
    }
    Ok(())
}

/// The name in the tables of the device with this section: `usb-ptr` of `0000:00:03.0/1/usb-ptr`. Nothing for a PCI
/// function, which is compared by its address.
fn kind(section: &str) -> &str {
    match section.rsplit_once('/') {
        None => section,
        Some((place, name)) if place.starts_with("virtio-mmio@") || place.contains('/') => name,
        Some(_) => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plugged(kinds: &[&str]) -> Vec<Plugged> {
        kinds.iter().map(|kind| Plugged { kind: (*kind).to_owned(), path: String::new() }).collect()
    }

    #[test]
    fn devices_of_a_kind_are_counted() {
        let sections = [
            "cpu",
            "serial",
            "serial",
            "0000:00:02.0/vga",
            "0000:00:03.0/2.1/usb-ptr",
            "virtio-mmio@00feb02e00/virtio-rng",
        ];
        let same = ["isa-serial", "VGA", "isa-serial", "usb-tablet", "virtio-rng-device", "isa-debugcon"];
        kinds(&sections, &plugged(&same), true).unwrap();
        for at in [0, 3, 4] {
            let (mut fewer, mut more) = (same.to_vec(), same.to_vec());
            let removed = fewer.remove(at);
            let missing = kinds(&sections, &plugged(&fewer), true).unwrap_err();
            assert!(missing.contains("missing") && missing.contains(removed), "{missing}");
            more.push(removed);
            let too_many = kinds(&sections, &plugged(&more), true).unwrap_err();
            assert!(too_many.contains("no state") && too_many.contains(removed), "{too_many}");
        }
        // Other machines may keep theirs elsewhere.
        kinds(&["serial"], &plugged(&[]), false).unwrap();
    }
}
