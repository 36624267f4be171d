//! Can it be done? Asked before anything changes.

use std::path::Path;

use fastload_qmp::{Capabilities, Qmp, QmpError};
use nix::sys::statvfs::statvfs;
use page_units::ByteLen;
use serde_json::{Value, json};
use whole_file::WholeFile;

use crate::commands::Failure;

/// What QEMU's background-snapshot can't be combined with (QEMU migration/options.c, `migrate_caps_check`), then
/// what it can be, but takes RAM out of the stream.
const INCOMPATIBLE: [&str; 17] = [
    "auto-converge",
    "dirty-bitmaps",
    "late-block-activate",
    "multifd",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "return-path",
    "validate-uuid",
    "x-colo",
    "xbzrle",
    "zero-copy-send",
    "mapped-ram",
    "x-ignore-shared",
];

/// The first version of QEMU that leaves a paused guest paused after a background snapshot (QEMU migration/migration.c,
/// `bg_migration_vm_start_bh`).
const PAUSED_STAYS: (u64, u64, u64) = (9, 0, 0);

/// The space that is kept free for a QEMU's state without its RAM.
const DEVICE_STATE: ByteLen = ByteLen(16 << 20);

/// A guest that can be captured.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) running: bool,
    /// Whether the last migration did.
    pub(super) failed: bool,
    pub(super) capabilities: Capabilities,
    /// The length of all RAM blocks now.
    pub(super) ram: ByteLen,
    /// The length that they may grow to.
    pub(super) most_ram: ByteLen,
    /// The images that the guest writes to.
    pub(super) disks: Vec<String>,
}

/// Refuses a QEMU that can't be captured, by what it says about itself.
pub(super) fn ready(qmp: &mut Qmp) -> Result<Guest, Failure> {
    let state = qmp.run_state()?;
    if !matches!(state.as_str(), "running" | "paused") {
        return Err(format!("the guest is {state}: only one that is running or paused can be captured").into());
    }
    let info = qmp.execute("query-migrate", json!({}))?;
    let migration = info["status"].as_str().unwrap_or("none");
    if !matches!(migration, "none" | "completed" | "failed" | "cancelled") {
        return Err(format!("QEMU is busy with a migration ({migration}): wait for its end, or cancel it").into());
    }
    if let Some(reasons) = info["blocked-reasons"].as_array().filter(|reasons| !reasons.is_empty()) {
        let reasons: Vec<&str> = reasons.iter().filter_map(Value::as_str).collect();
        return Err(format!("QEMU can't save this guest: {}", reasons.join("; ")).into());
    }
    let capabilities = qmp.capabilities()?;
    if !capabilities.0.contains_key("background-snapshot") {
        return Err("this QEMU has no capability background-snapshot: it takes QEMU 6.0 or later, on Linux".into());
    }
    let on = |name: &&&str| capabilities.0.get(**name) == Some(&true);
    let set: Vec<&str> = INCOMPATIBLE.iter().filter(on).copied().collect();
    if !set.is_empty() {
        let set = set.join(", ");
        return Err(format!("QEMU's migration capabilities do not allow it: turn off {set}").into());
    }
    parameters(qmp)?;
    if machine_property(qmp, "suppress-vmdesc")?.as_bool() == Some(true) {
        return Err(
            "the machine has suppress-vmdesc on: nothing would tell whether its device state is complete".into()
        );
    }
    memory_devices(qmp)?;
    let mut disks: Vec<String> =
        qmp.image_files()?.into_iter().filter(|image| image.writable).map(|image| image.file).collect();
    disks.sort();
    disks.dedup();
    let blocks = qmp.ram_blocks()?;
    if blocks.is_empty() || qmp.machine()? == "none" {
        return Err("this QEMU has a machine without memory (-machine none): there is nothing to capture".into());
    }
    if state == "paused" && qmp.version() < PAUSED_STAYS {
        let (major, minor, micro) = qmp.version();
        return Err(format!(
            "the guest is paused, and QEMU {major}.{minor}.{micro} would start it when it has saved it (QEMU 9.0 and later do \
             not): let it run, then capture it"
        )
        .into());
    }
    let sum = |lengths: &mut dyn Iterator<Item = u64>| ByteLen(lengths.fold(0, u64::saturating_add));
    let ram = sum(&mut blocks.iter().map(|block| block.used));
    let most_ram = sum(&mut blocks.iter().map(|block| block.most.max(block.used)));
    Ok(Guest { running: state == "running", failed: migration == "failed", capabilities, ram, most_ram, disks })
}

fn parameters(qmp: &mut Qmp) -> Result<(), Failure> {
    let parameters = qmp.execute("query-migrate-parameters", json!({}))?;
    if parameters["tls-creds"].as_str().is_some_and(|name| !name.is_empty()) {
        return Err("QEMU's migration parameter tls-creds is set: it would encrypt what it sends; empty it".into());
    }
    match parameters["mode"].as_str() {
        None | Some("normal") => Ok(()),
        Some(mode) => Err(format!("QEMU's migration parameter mode is {mode}: set it to normal").into()),
    }
}

/// Memory whose plugged-in parts are described before RAM, where nothing tells the length of the description.
fn memory_devices(qmp: &mut Qmp) -> Result<(), Failure> {
    let devices = match qmp.execute("query-memory-devices", json!({})) {
        Err(QmpError::Refused { .. }) => return Ok(()), // a machine without any
        answer => answer?,
    };
    let virtio = |device: &&Value| device["type"] == "virtio-mem";
    match devices.as_array().and_then(|devices| devices.iter().find(virtio)) {
        Some(device) => {
            let name = device["data"]["id"].as_str().unwrap_or("virtio-mem");
            Err(format!("the guest has a virtio-mem device ({name}), which can't be captured").into())
        }
        None => Ok(()),
    }
}

fn machine_property(qmp: &mut Qmp, name: &str) -> Result<Value, QmpError> {
    match qmp.execute("qom-get", json!({"path": "/machine", "property": name})) {
        Err(QmpError::Refused { .. }) => Ok(Value::Null), // a QEMU that does not have it
        answer => answer,
    }
}

/// Refuses a path where no file can be made.
pub(super) fn writable(output: &Path) -> Result<(), Failure> {
    Ok(WholeFile::create(output).map(drop)?)
}

/// Refuses a disk without space for all of RAM.
pub(super) fn space(output: &Path, ram: ByteLen) -> Result<(), Failure> {
    let name = output.display();
    let file = whole_file::target(output)?;
    let disk = statvfs(directory(&file)).map_err(|error| format!("{name}: its disk can't be asked: {error}"))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    let needed = ram.0.saturating_add(DEVICE_STATE.0);
    if free >= needed {
        return Ok(());
    }
    Err(format!(
        "{name}: the disk has {} free, and the guest has {} of memory; if enough of that is zero, use --any-space",
        indicatif::HumanBytes(free),
        indicatif::HumanBytes(needed),
    )
    .into())
}

fn directory(output: &Path) -> &Path {
    match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
