//! Root buses: the machine's own, and those of `-device pxb` and its like.

use std::collections::{HashMap, HashSet};

use fastload_qmp::{Qmp, QmpError};
use serde_json::Value;

use super::{Plugged, get, slot};

/// What the addresses on the machine's own root bus begin with.
pub(super) const OWN_ROOT: &str = "0000:00:";

/// Types that make a further root bus.
const EXPANDERS: [&str; 3] = ["pxb", "pxb-pcie", "pxb-cxl"];

/// Types of the bridges between the processors and a further root bus. There is one for each of these.
pub(super) const OTHER_HOSTS: [&str; 2] = ["pxb-host", "pxb-cxl-host"];

/// The slots of the devices that make further root buses, by the numbers of these.
pub(super) fn expanders(qmp: &mut Qmp, plugged: &[Plugged]) -> Result<HashMap<u64, String>, QmpError> {
    let mut slots = HashMap::new();
    for device in plugged.iter().filter(|device| EXPANDERS.contains(&device.kind.as_str())) {
        let number = get(qmp, &device.path, "bus_nr")?.as_u64();
        let slot = slot(&get(qmp, &device.path, "addr")?);
        slots.extend(number.zip(slot));
    }
    Ok(slots)
}

/// What the addresses on these root buses begin with: the number, and the slot of what made it (QEMU hw/pci/pci.c,
/// `pcibus_get_dev_path`, and hw/pci-bridge/pci_expander_bridge.c, `pxb_host_root_bus_path`). Nothing if they are not
/// told apart.
pub(super) fn prefixes(buses: &[Value], expanders: &HashMap<u64, String>) -> Option<Vec<String>> {
    let prefix = |bus: &Value| match bus["bus"].as_u64()? {
        0 => Some(OWN_ROOT.to_owned()),
        number => Some(format!("0000:{number:02x}:{}:", expanders.get(&number)?)),
    };
    let all: Vec<String> = buses.iter().map(prefix).collect::<Option<_>>()?;
    let different: HashSet<&String> = all.iter().collect();
    (different.len() == all.len() && all.iter().any(|prefix| prefix == OWN_ROOT)).then_some(all)
}

/// The path of each bridge to a further root bus, and what the addresses there begin with. Nothing if that can't be
/// told.
pub(super) fn hosts<'a>(prefixes: &'a [String], plugged: &'a [Plugged]) -> Option<HashMap<&'a str, &'a str>> {
    let mut hosts: Vec<&str> = plugged
        .iter()
        .filter(|device| OTHER_HOSTS.contains(&device.kind.as_str()))
        .map(|device| device.path.as_str())
        .collect();
    // In the order in which they were made.
    hosts.sort_by_key(|path| {
        path.rsplit_once('[').and_then(|(_, number)| number.trim_end_matches(']').parse::<u64>().ok())
    });
    // QEMU lists the buses beginning with the newest (hw/pci/pci.c, `pci_host_bus_register`): its own is the last.
    let (own, others) = prefixes.split_last()?;
    let fits = own == OWN_ROOT && hosts.len() == others.len();
    fits.then(|| hosts.into_iter().zip(others.iter().rev().map(String::as_str)).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn several_root_buses() {
        let device = |kind: &str, path: &str| Plugged { kind: kind.into(), path: path.into() };
        let plugged = [
            device("pxb-host", "/machine/unattached/device[10]"),
            device("pxb-pcie", "/machine/peripheral/p"),
            device("pxb-cxl-host", "/machine/unattached/device[9]"),
        ];
        let buses = |numbers: &[u64]| numbers.iter().map(|number| json!({"bus": number})).collect::<Vec<_>>();
        let expanders = HashMap::from([(64, "08.0".to_owned()), (128, "09.0".to_owned())]);
        let prefixes = |numbers: &[u64]| prefixes(&buses(numbers), &expanders);
        let found = prefixes(&[128, 64, 0]).unwrap();
        assert_eq!(found, ["0000:80:09.0:", "0000:40:08.0:", "0000:00:"]);
        let expected =
            [("/machine/unattached/device[9]", "0000:40:08.0:"), ("/machine/unattached/device[10]", "0000:80:09.0:")];
        assert_eq!(hosts(&found, &plugged), Some(HashMap::from(expected)));
        // What is in no order that is known, or not all there.
        assert_eq!(hosts(&prefixes(&[0, 128, 64]).unwrap(), &plugged), None);
        assert_eq!(hosts(&found, &plugged[..2]), None);
        assert_eq!(hosts(&prefixes(&[0]).unwrap(), &[]), Some(HashMap::new()));
        for wrong in [&[0, 0][..], &[128, 64], &[0, 1], &[]] {
            assert_eq!(prefixes(wrong), None);
        }
    }
}
