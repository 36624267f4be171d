//! PCI functions of which the snapshot has state, and QEMU's own, by address.

mod roots;

use std::collections::{BTreeMap, HashMap};

use fastload_qmp::{Qmp, QmpError};
use serde_json::{Value, json};

use self::roots::{OTHER_HOSTS, OWN_ROOT, expanders, hosts, prefixes};
use super::devices::{Plugged, Unlike};
use crate::commands::serving;

/// Types that have no state (QEMU 10.0: each saved once, but pxb-cxl, which is a pxb).
const STATELESS: [&str; 10] = [
    "AMDVI-PCI",
    "ati-vga",
    "cxl-downstream",
    "cxl-rp",
    "cxl-upstream",
    "edu",
    "pci-testdev",
    "pxb",
    "pxb-cxl",
    "pxb-pcie",
];

/// PCI device numbers of vendor 0x1af4 and the sections of these devices (virtio specification, 4.1.2 and 5).
const VIRTIO: [(u64, &str); 12] = [
    (0x1000, "virtio-net"),
    (0x1001, "virtio-blk"),
    (0x1002, "virtio-balloon"),
    (0x1003, "virtio-console"),
    (0x1004, "virtio-scsi"),
    (0x1005, "virtio-rng"),
    (0x1041, "virtio-net"),
    (0x1042, "virtio-blk"),
    (0x1043, "virtio-console"),
    (0x1044, "virtio-rng"),
    (0x1045, "virtio-balloon"),
    (0x1048, "virtio-scsi"),
];

/// Compares the functions on and below all root buses.
pub(super) fn compare(qmp: &mut Qmp, sections: &[&str], plugged: &[Plugged]) -> Result<(), Unlike> {
    let mut saved: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (address, device) in sections.iter().filter_map(|section| address(section)) {
        saved.entry(address).or_default().push(device);
    }
    let buses = match qmp.execute("query-pci", json!({})) {
        Err(QmpError::Refused { .. }) => return Ok(()), // a machine without PCI
        answer => answer?.as_array().cloned().unwrap_or_default(),
    };
    let Some(prefixes) = prefixes(&buses, &expanders(qmp, plugged)?) else {
        if !buses.is_empty() {
            serving::note(
                "the PCI devices are not compared: this machine has several root buses, which are not told apart",
            );
        }
        return Ok(());
    };
    let mut now: Functions = buses.iter().zip(&prefixes).flat_map(|(bus, prefix)| on(bus, prefix)).collect();
    let hosts = hosts(&prefixes, plugged);
    if hosts.is_none() {
        serving::note("PCI devices on another root bus than the first are not compared");
        now.retain(|address, _| address.starts_with(OWN_ROOT));
        saved.retain(|address, _| address.starts_with(OWN_ROOT));
    }
    // Behind a bridge QEMU lists nothing before the firmware has given the bus a number.
    let mut devices = buses.iter().flat_map(|bus| bus["devices"].as_array().into_iter().flatten());
    let bridges = devices.any(|device| !device["pci_bridge"].is_null());
    let mut stateless = Vec::new();
    if bridges || saved.len() != now.len() {
        for (address, kind) in behind(qmp, plugged, hosts.as_ref())? {
            if STATELESS.contains(&kind) {
                stateless.push(address.clone());
            }
            now.entry(address).or_insert(None);
        }
    }
    Ok(same(&saved, &now, &stateless)?)
}

/// Functions by address, and the section of those that are known by their number.
type Functions = BTreeMap<String, Option<&'static str>>;

fn same(saved: &BTreeMap<&str, Vec<&str>>, now: &Functions, stateless: &[String]) -> Result<(), String> {
    let unlike = |(address, device): &(&String, &Option<&str>)| {
        device.is_some_and(|device| saved.get(address.as_str()).is_some_and(|saved| !saved.contains(&device)))
    };
    if let Some((address, device)) = now.iter().find(unlike) {
        let saved = saved.get(address.as_str()).map(|names| names.join(", ")).unwrap_or_default();
        let device = device.unwrap_or_default();
        return Err(format!(
            "its device at PCI address {address} is {saved}, but this QEMU's is {device}: start it with the same devices, in the same order"
        ));
    }
    if let Some((address, names)) = saved.iter().find(|(address, _)| !now.contains_key(**address)) {
        let device = names.join(", ");
        return Err(format!(
            "its device {device} at PCI address {address} is missing in this QEMU: start it with the same devices, in the same order"
        ));
    }
    let more = now.keys().find(|address| !saved.contains_key(address.as_str()) && !stateless.contains(address));
    match more {
        Some(address) => Err(format!(
            "there is no state for the device that this QEMU has at PCI address {address}: start it with the same devices, in the same order"
        )),
        None => Ok(()),
    }
}

/// The address and the device in the name of a section such as `0000:00:02.0/virtio-net`. Nothing for what is not a
/// function but behind one.
fn address(section: &str) -> Option<(&str, &str)> {
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

/// The functions on a root bus.
fn on(bus: &Value, prefix: &str) -> Functions {
    let functions = bus["devices"].as_array().into_iter().flatten();
    let named = functions.map(|function| {
        let number = |name: &str| function[name].as_u64().unwrap_or(0);
        let id = |name: &str| function["id"][name].as_u64();
        let virtio = VIRTIO.iter().find(|(device, _)| id("vendor") == Some(0x1af4) && id("device") == Some(*device));
        (format!("{prefix}{:02x}.{:x}", number("slot"), number("function")), virtio.map(|(_, section)| *section))
    });
    named.collect()
}

/// A PCI device among those that QEMU lists.
struct Function<'a> {
    kind: &'a str,
    /// The bus that it is on: the path of the bridge, then the name.
    bus: String,
    slot: String,
}

/// The addresses of the PCI devices that QEMU lists, and their types. Those below another root bus are left out unless
/// `hosts` tells which.
fn behind<'a>(
    qmp: &mut Qmp,
    plugged: &'a [Plugged],
    hosts: Option<&HashMap<&str, &str>>,
) -> Result<Vec<(String, &'a str)>, QmpError> {
    let mut functions: HashMap<&str, Function<'a>> = HashMap::new();
    for device in plugged {
        let Some(slot) = slot(&get(qmp, &device.path, "addr")?) else { continue };
        let bus = get(qmp, &device.path, "parent_bus")?.as_str().unwrap_or_default().to_owned();
        functions.insert(&device.path, Function { kind: &device.kind, bus, slot });
    }
    let other_roots = plugged.iter().filter(|device| OTHER_HOSTS.contains(&device.kind.as_str()));
    let roots: HashMap<&str, Option<&str>> = other_roots
        .map(|device| (device.path.as_str(), hosts.and_then(|hosts| hosts.get(device.path.as_str()).copied())))
        .collect();
    let full = |path: &str| full_address(path, &functions, &roots);
    Ok(functions.iter().filter_map(|(path, function)| Some((full(path)?, function.kind))).collect())
}

/// A property of a device; null if it has none of that name.
fn get(qmp: &mut Qmp, path: &str, property: &str) -> Result<Value, QmpError> {
    match qmp.execute("qom-get", json!({"path": path, "property": property})) {
        Err(QmpError::Refused { .. }) => Ok(Value::Null),
        answer => answer,
    }
}

/// The address with those of all bridges above (QEMU hw/pci/pci.c, `pcibus_get_dev_path`). `roots`: what it begins with
/// below other bridges to the processors than the machine's own, where that is known.
fn full_address(
    path: &str,
    functions: &HashMap<&str, Function<'_>>,
    roots: &HashMap<&str, Option<&str>>,
) -> Option<String> {
    let mut slots = Vec::new();
    let mut at = path;
    while let Some(function) = functions.get(at) {
        // No tree is deeper: there are 256 buses.
        if slots.len() > 256 {
            return None;
        }
        slots.push(function.slot.as_str());
        at = function.bus.rsplit_once('/')?.0;
    }
    slots.reverse();
    // What is above is the bridge to the processors.
    let prefix = roots.get(at).copied().unwrap_or(Some(OWN_ROOT))?;
    Some(format!("{prefix}{}", slots.join(":")))
}

/// The property `addr`: eight times the slot and the function.
fn slot(property: &Value) -> Option<String> {
    let number = property.as_u64().filter(|number| *number < 256)?;
    Some(format!("{:02x}.{:x}", number >> 3, number & 7))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_and_without_an_address() {
        assert_eq!(address("0000:00:02.0/virtio-net"), Some(("0000:00:02.0", "virtio-net")));
        assert_eq!(address("0000:00:1c.0:00.0/e1000e"), Some(("0000:00:1c.0:00.0", "e1000e")));
        for other in ["cpu", "0000:00/x", "0000:00:2.0/x", "a/b", "0000:00:01.2/1/usb-tablet", "/rom@etc/acpi/tables"] {
            let expected = other.starts_with("0000:00:01.2").then_some(("0000:00:01.2", "1/usb-tablet"));
            assert_eq!(address(other), expected, "{other}");
        }
    }

    #[test]
    fn functions_of_the_root_bus() {
        let rng = json!({"vendor": 0x1af4, "device": 0x1005});
        let root = json!({"bus": 0, "devices": [{"slot": 28, "function": 1, "id": {}}, {"slot": 2, "function": 0, "id": rng}]});
        let expected = [("0000:00:02.0".to_owned(), Some("virtio-rng")), ("0000:00:1c.1".to_owned(), None)];
        assert_eq!(on(&root, OWN_ROOT), BTreeMap::from(expected));
    }

    #[test]
    fn functions_behind_bridges() {
        let function = |bus: &str, addr: u64| Function { kind: "", bus: bus.into(), slot: slot(&json!(addr)).unwrap() };
        let functions = HashMap::from([
            ("/machine/peripheral/r", function("/machine/q35/pcie.0", 42)),
            ("/machine/peripheral-anon/device[0]", function("/machine/peripheral/r/r", 1)),
            ("/machine/peripheral/p", function("/machine/unattached/device[22]/p", 0)),
            ("/machine/peripheral/q", function("/machine/unattached/device[9]/q", 8)),
            ("/machine/peripheral/s", function("/machine/peripheral/q/q", 0)),
            ("/machine/peripheral/loop", function("/machine/peripheral/loop/x", 0)),
        ]);
        let roots = HashMap::from([
            ("/machine/unattached/device[22]", None),
            ("/machine/unattached/device[9]", Some("0000:80:08.0:")),
        ]);
        let full = |path: &str| full_address(path, &functions, &roots);
        assert_eq!(full("/machine/peripheral/s").as_deref(), Some("0000:80:08.0:01.0:00.0"));
        assert_eq!(full("/machine/peripheral/r").as_deref(), Some("0000:00:05.2"));
        assert_eq!(full("/machine/peripheral-anon/device[0]").as_deref(), Some("0000:00:05.2:00.1"));
        assert_eq!(full("/machine/peripheral/p"), None);
        assert_eq!(full("/machine/peripheral/loop"), None);
        assert_eq!(slot(&json!("05.2")), None);
    }
}
