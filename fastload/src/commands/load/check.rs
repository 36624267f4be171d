//! Does the snapshot fit the QEMU? Asked before anything starts: QEMU itself finds out late, or never.

use std::collections::HashMap;
use std::path::Path;

use fastload_qmp::{GuestBlock, Qmp};
use mapped_ram::Snapshot;
use page_units::{PageSize, RamBlock};
use serde_json::json;
use vmstate::{GlobalState, SectionKind};

use super::devices;
use crate::commands::Failure;
use crate::contents;
use crate::recognise::{self, Known};

/// What is compared in addition to machine type and RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// Processors and devices.
    All,
    /// Processors.
    NotDevices,
    /// Nothing: a guest that is to be recovered runs, and may have got or lost devices and processors since.
    Recovered,
}

/// Compares machine type, RAM, processors and devices. The page sizes of the QEMU's RAM blocks.
pub(super) fn fits(
    qmp: &mut Qmp,
    snapshot: &Snapshot,
    path: &Path,
    compared: Compared,
) -> Result<HashMap<String, PageSize>, Failure> {
    let name = path.display();
    let (saved, machine) = (&snapshot.configuration().machine, qmp.machine()?);
    if *saved != machine {
        return Err(format!("{name}: it was saved from a machine of type {saved}, but this QEMU is a {machine}: start it with -machine {saved}").into());
    }
    uuid(qmp, snapshot, path)?;
    if compared != Compared::Recovered {
        processors(qmp, snapshot, path)?;
    }
    let blocks = qmp.ram_blocks()?;
    for block in snapshot.layout().blocks() {
        same_block(block, &blocks).map_err(|reason| format!("{name}: {reason}"))?;
    }
    if let Some(more) = blocks.iter().find(|block| block.used > 0 && snapshot.layout().find(&block.name).is_none()) {
        return Err(format!("{name}: this QEMU has a RAM block \"{}\" that the snapshot has not: it has a device too many, or memory under another name", more.name).into());
    }
    if compared == Compared::All {
        devices::compare(qmp, snapshot).map_err(|reason| format!("{name}: {reason}"))?;
    }
    let size = |block: &GuestBlock| Some((block.name.clone(), PageSize::new(block.page_size)?));
    Ok(blocks.iter().filter_map(size).collect())
}

/// The run state that the guest was in when it was saved. QEMU itself does not look, with postcopy.
pub(super) fn saved_state(snapshot: &Snapshot) -> Result<String, Failure> {
    // libvirt stops every guest before it saves it, and keeps in its own header whether it ran.
    if let Ok(Known::Libvirt(header, stream)) = recognise::at(snapshot.path())
        && stream == snapshot.base()
    {
        let state = if header.was_running { "running" } else { "paused, says libvirt" };
        return Ok(state.to_owned());
    }
    let failed = |error: &dyn std::error::Error| format!("{}: {error}", snapshot.path().display());
    let state = snapshot.sections().iter().find(|s| s.kind == SectionKind::Full && s.name == GlobalState::SECTION);
    let Some(device) = state.map(|entry| contents::device(snapshot, entry)).transpose()?.flatten() else {
        return Ok("running".to_owned());
    };
    let value = device.decode().map_err(|error| failed(&error))?;
    Ok(GlobalState::from_value(&value).map_err(|error| failed(&error))?.runstate)
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
