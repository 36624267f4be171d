//! Does the snapshot fit the QEMU? Asked before anything starts: QEMU itself finds out late, or never.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use fastload_qmp::{GuestBlock, Qmp, QmpError};
use mapped_ram::Snapshot;
use page_units::{PageSize, RamBlock};
use serde_json::{Value, json};
use vmstate::SectionKind;

use crate::commands::{Failure, serving};
use crate::contents;

/// Compares machine type, RAM, processors and PCI devices. The page sizes of the QEMU's RAM blocks.
pub(super) fn fits(qmp: &mut Qmp, snapshot: &Snapshot, path: &Path) -> Result<HashMap<String, PageSize>, Failure> {
    let name = path.display();
    let (saved, machine) = (&snapshot.configuration().machine, qmp.machine()?);
    if *saved != machine {
        return Err(format!("{name}: it was saved from a machine of type {saved}, but this QEMU is a {machine}: start it with -machine {saved}").into());
    }
    uuid(qmp, snapshot, path)?;
    processors(qmp, snapshot, path)?;
    let blocks = qmp.ram_blocks()?;
    for block in snapshot.layout().blocks() {
        same_block(block, &blocks).map_err(|reason| format!("{name}: {reason}"))?;
    }
    if let Some(more) = blocks.iter().find(|block| block.used > 0 && snapshot.layout().find(&block.name).is_none()) {
        return Err(format!("{name}: this QEMU has a RAM block \"{}\" that the snapshot has not: it has a device too many, or memory under another name", more.name).into());
    }
    devices(qmp, snapshot, path)?;
    let size = |block: &GuestBlock| Some((block.name.clone(), PageSize::new(block.page_size)?));
    Ok(blocks.iter().filter_map(size).collect())
}

/// Whether the guest was running when it was saved. QEMU itself does not look, with postcopy.
pub(super) fn ran(snapshot: &Snapshot) -> Result<bool, Failure> {
    let state = snapshot.sections().iter().find(|s| s.kind == SectionKind::Full && s.name == "globalstate");
    let Some(state) = state else { return Ok(true) };
    // QEMU migration/global_state.c: length (4 bytes), then the name of the run state.
    let body = contents::read(snapshot, state.body.clone())?;
    let text: Vec<u8> = body.iter().skip(4).copied().take_while(|byte| *byte != 0).collect();
    Ok(text == b"running")
}

fn uuid(qmp: &mut Qmp, snapshot: &Snapshot, path: &Path) -> Result<(), Failure> {
    let Some(saved) = snapshot.configuration().uuid() else { return Ok(()) };
    let hex: String = saved.iter().map(|byte| format!("{byte:02x}")).collect();
    let now = qmp.execute("query-uuid", json!({}))?["UUID"].as_str().unwrap_or_default().replace('-', "");
    if now != hex && now.chars().any(|digit| digit != '0') {
        let path = path.display();
        return Err(format!("{path}: it was saved from the guest with UUID {hex}, but this QEMU has UUID {now}").into());
    }
    Ok(())
}

fn processors(qmp: &mut Qmp, snapshot: &Snapshot, path: &Path) -> Result<(), Failure> {
    let full =
        |name: &str| snapshot.sections().iter().filter(|s| s.kind == SectionKind::Full && s.name == name).count();
    let (saved, now) = (full("cpu"), qmp.execute("query-cpus-fast", json!({}))?.as_array().map_or(0, Vec::len));
    let path = path.display();
    if saved != now {
        return Err(format!(
            "{path}: it was saved with {saved} processors, but this QEMU has {now}: start it with -smp {saved}"
        )
        .into());
    }
    let kvm = qmp.execute("query-kvm", json!({}))?["enabled"].as_bool() == Some(true);
    if full("kvmclock") > 0 && !kvm {
        return Err(
            format!("{path}: it was saved under KVM, but this QEMU runs without: start it with -accel kvm").into()
        );
    }
    Ok(())
}

fn same_block(block: &RamBlock, blocks: &[GuestBlock]) -> Result<(), String> {
    let (name, saved) = (block.name(), block.length().0);
    let Some(now) = blocks.iter().find(|block| block.name == name) else {
        let known: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        return Err(format!(
            "its RAM block \"{name}\" is not in this QEMU (which has {}): a device is missing, or memory has another name",
            known.join(", ")
        ));
    };
    // A block that may grow is given the saved length.
    let fits = if now.used < now.most { saved <= now.most } else { saved == now.used };
    if !fits {
        return Err(format!(
            "its RAM block \"{name}\" is {}, but this QEMU's is {}: start it with the same -m, and the same devices",
            indicatif::HumanBytes(saved),
            indicatif::HumanBytes(now.used),
        ));
    }
    if !saved.is_multiple_of(now.page_size) {
        return Err(format!(
            "its RAM block \"{name}\" is {}, not a whole number of the pages of {} that this QEMU has",
            indicatif::HumanBytes(saved),
            indicatif::HumanBytes(now.page_size),
        ));
    }
    Ok(())
}

/// PCI devices of which the snapshot has state, and QEMU's own.
fn devices(qmp: &mut Qmp, snapshot: &Snapshot, path: &Path) -> Result<(), Failure> {
    let full = snapshot.sections().iter().filter(|section| section.kind == SectionKind::Full);
    let saved: Vec<(&str, &str)> = full.filter_map(|section| pci_address(&section.name)).collect();
    let buses = match qmp.execute("query-pci", json!({})) {
        Err(QmpError::Refused { .. }) => Vec::new(), // a machine without PCI
        answer => answer?.as_array().cloned().unwrap_or_default(),
    };
    if buses.len() > 1 && buses.iter().filter(|bus| !is_below(bus, &buses)).count() > 1 {
        return Ok(()); // The addresses of several root buses are not comparable.
    }
    let mut now = BTreeSet::new();
    if let Some(root) = buses.first() {
        collect(&root["devices"], "0000:00", &mut now);
    }
    let path = path.display();
    if let Some((address, device)) = saved.iter().find(|(address, _)| !now.contains(*address)) {
        return Err(format!("{path}: its device {device} at PCI address {address} is missing in this QEMU: start it with the same devices, in the same order").into());
    }
    let known: BTreeSet<&str> = saved.iter().map(|(address, _)| *address).collect();
    if let Some(more) = now.iter().find(|address| !known.contains(address.as_str())) {
        serving::note(&format!("{path}: there is no state for the device that this QEMU has at PCI address {more}"));
    }
    Ok(())
}

fn is_below(bus: &Value, buses: &[Value]) -> bool {
    buses.first().is_none_or(|root| root["bus"] != bus["bus"]) && bus["bus"].as_u64() != Some(0)
}

/// The address and the device in the name of a section such as `0000:00:02.0/virtio-net`.
fn pci_address(section: &str) -> Option<(&str, &str)> {
    let (address, device) = section.split_once('/')?;
    let mut parts = address.split(':');
    let digits = |part: &str, count: usize| part.len() == count && part.chars().all(|c| c.is_ascii_hexdigit());
    let root = digits(parts.next()?, 4) && digits(parts.next()?, 2);
    let mut slots = parts.peekable();
    slots.peek()?;
    let all =
        slots.all(|slot| slot.split_once('.').is_some_and(|(slot, function)| digits(slot, 2) && digits(function, 1)));
    (root && all).then_some((address, device))
}

/// The addresses of all functions, those behind bridges included, as QEMU makes names of them
/// (hw/pci/pci.c, `pcibus_get_dev_path`).
fn collect(devices: &Value, above: &str, into: &mut BTreeSet<String>) {
    for device in devices.as_array().into_iter().flatten() {
        let number = |name: &str| device[name].as_u64().unwrap_or(0);
        let address = format!("{above}:{:02x}.{:x}", number("slot"), number("function"));
        collect(&device["pci_bridge"]["devices"], &address, into);
        into.insert(address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_and_without_an_address() {
        assert_eq!(pci_address("0000:00:02.0/virtio-net"), Some(("0000:00:02.0", "virtio-net")));
        assert_eq!(pci_address("0000:00:1c.0:00.0/e1000e"), Some(("0000:00:1c.0:00.0", "e1000e")));
        for other in ["cpu", "0000:00/x", "0000:00:2.0/x", "a/b", "0000:00:01.2/1/usb-tablet", "/rom@etc/acpi/tables"] {
            let expected = other.starts_with("0000:00:01.2").then_some(("0000:00:01.2", "1/usb-tablet"));
            assert_eq!(pci_address(other), expected, "{other}");
        }
    }

    #[test]
    fn functions_behind_bridges() {
        let tree = json!([{"slot": 28, "function": 0, "pci_bridge": {"devices": [{"slot": 0, "function": 1}]}}]);
        let mut found = BTreeSet::new();
        collect(&tree, "0000:00", &mut found);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["0000:00:1c.0", "0000:00:1c.0:00.1"]);
    }
}
