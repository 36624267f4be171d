//! Whether the devices' state is what its description says.

use std::collections::HashSet;

use mapped_ram::Snapshot;
use vmstate::SectionKind;

use super::Findings;
use crate::contents::MOST_OF_A_DEVICE;

/// Decodes every section, and compares the list of sections with the description.
pub(super) fn check(snapshot: &Snapshot, findings: &mut Findings) {
    let mut seen = HashSet::new();
    for section in snapshot.sections().iter().filter(|section| section.kind == SectionKind::Full) {
        let (name, instance) = (section.name.as_str(), section.instance);
        findings.devices += 1;
        if !seen.insert((name, instance)) {
            findings.problems.push(format!("device section \"{name}\" {instance} is there twice"));
            // It would be the first one again.
            continue;
        }
        if section.body.end - section.body.start > MOST_OF_A_DEVICE {
            findings.notes.push(format!("device section \"{name}\" {instance} is too long to be decoded"));
            continue;
        }
        let device = match snapshot.device(name, instance) {
            Ok(Some(device)) => device,
            Ok(None) => {
                findings.problems.push(format!("device section \"{name}\" {instance} is not described"));
                continue;
            }
            Err(error) => {
                findings.problems.push(format!("reading device section \"{name}\" {instance}: {error}"));
                continue;
            }
        };
        if let Err(error) = device.decode() {
            findings.problems.push(format!("device section \"{name}\" {instance}: {error}"));
        }
    }
    if !snapshot.is_complete() {
        return;
    }
    if let Some(vmdesc) = snapshot.vmdesc() {
        for device in vmdesc.devices().iter().filter(|device| !seen.contains(&(device.name.as_str(), device.instance)))
        {
            let (name, instance) = (&device.name, device.instance);
            findings.problems.push(format!("device \"{name}\" {instance} is described, but has no section"));
        }
    }
}
