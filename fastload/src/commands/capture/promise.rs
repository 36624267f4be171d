//! Can what a capture promises be kept? QEMU write-protects the guest's RAM in its own process: what other processes write,
//! and what is not RAM to it, changes on.

use std::fs;
use std::os::unix::fs::MetadataExt;

use fastload_qmp::{MemoryBackend, Process, Qmp, QmpError};
use serde_json::{Value, json};

use crate::commands::Failure;

/// What can be captured all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Allow {
    /// Memory to which other processes write.
    SharedMemory,
    /// Flash memory to which the guest writes.
    Flash,
    /// More of the host's memory than it has to spare.
    Allocation,
    /// Memory whose equal pages the kernel merges.
    Merging,
}

/// How much more memory is worth a word, in bytes.
const MUCH: u64 = 64 << 20;

/// Refuses what can't be kept, unless that is allowed. What else is to be known.
pub(super) fn check(qmp: &mut Qmp, running: bool, allowed: &[Allow]) -> Result<Vec<String>, Failure> {
    let mut told = Vec::new();
    let mut broken = |allow: Allow, name: &str, what: String, cure: &str| -> Result<(), Failure> {
        if allowed.contains(&allow) {
            told.push(what);
            return Ok(());
        }
        Err(format!("{what}: the file would not show the guest at one instant. {cure}, or use --allow {name}").into())
    };
    if running {
        let vhost_user = vhost_user(qmp)?;
        if !vhost_user.is_empty() {
            let what = format!(
                "another process writes to the guest's memory for its vhost-user devices ({})",
                vhost_user.join(", ")
            );
            broken(Allow::SharedMemory, "shared-memory", what, "Stop the guest first (QMP stop, then cont)")?;
        }
        let flash = writable_flash(qmp)?;
        if !flash.is_empty() {
            let what =
                format!("the guest can write to its flash memory ({}), which QEMU does not protect", flash.join(", "));
            broken(Allow::Flash, "flash", what, "Stop the guest first (QMP stop, then cont)")?;
        }
    }
    let backends = qmp.memory_backends()?;
    if running && merges() && (backends.iter().any(|backend| backend.merge) || machine_merges(qmp)?) {
        broken(Allow::Merging, "merging", MERGING.to_owned(), STOP_MERGING)?;
    }
    let shared: Vec<MemoryBackend> = backends.into_iter().filter(|backend| backend.share).collect();
    let Some(qemu) = qmp.process().filter(|_| !shared.is_empty()) else { return Ok(told) };
    let maps = mappings(qemu);
    let mut more = 0;
    for backend in &shared {
        let Some(map) = maps.iter().find(|map| map.length == backend.size) else { continue };
        let others = who_writes(map, qemu);
        if others.is_empty() {
            more += backend.size.saturating_sub(allocated(map, qemu).unwrap_or(backend.size));
            continue;
        }
        let others: Vec<String> = others.iter().map(Process::to_string).collect();
        let what = format!("{} has mapped the guest's memory {} and can write to it", others.join(" and "), backend.id);
        broken(Allow::SharedMemory, "shared-memory", what, "End it first")?;
    }
    let names: Vec<&str> = shared.iter().map(|backend| backend.id.as_str()).collect();
    if more >= MUCH {
        let (more, free) = (indicatif::HumanBytes(more), available());
        let what = format!(
            "QEMU reads all memory before a capture, and {} takes {more} more of the host then",
            names.join(", ")
        );
        if free.is_some_and(|free| more.0 > free) && !allowed.contains(&Allow::Allocation) {
            let free = indicatif::HumanBytes(free.unwrap_or_default());
            return Err(format!("{what}, which has {free} available: use --allow allocation to try").into());
        }
        told.push(what);
    }
    told.push(format!(
        "the guest's memory {} is shared (share=on): what another process writes to it after the freeze point may be in the file",
        names.join(", ")
    ));
    Ok(told)
}

const MERGING: &str =
    "the kernel merges equal pages of the guest's memory (KSM), and a page that is merged loses its protection";
const STOP_MERGING: &str = "Stop that (echo 0 > /sys/kernel/mm/ksm/run), or start QEMU with -machine mem-merge=off";

/// Whether the kernel merges pages now (Linux Documentation/admin-guide/mm/ksm.rst; mm/ksm.c, `replace_page`, makes entries
/// of the page table without the bit that protects).
fn merges() -> bool {
    fs::read_to_string("/sys/kernel/mm/ksm/run").is_ok_and(|run| run.trim() == "1")
}

/// Refuses a capture during which that has begun.
pub(super) fn check_again(qmp: &mut Qmp, running: bool, allowed: &[Allow]) -> Result<(), Failure> {
    if !running || allowed.contains(&Allow::Merging) || !merges() {
        return Ok(());
    }
    if qmp.memory_backends()?.iter().any(|backend| backend.merge) || machine_merges(qmp)? {
        return Err(format!("{MERGING}: it has begun meanwhile, and nothing was written. {STOP_MERGING}").into());
    }
    Ok(())
}

fn machine_merges(qmp: &mut Qmp) -> Result<bool, QmpError> {
    match qmp.execute("qom-get", json!({"path": "/machine", "property": "mem-merge"})) {
        Err(QmpError::Refused { .. }) => Ok(false),
        answer => Ok(answer? == true),
    }
}

/// The guest's devices that another process serves.
fn vhost_user(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    let mut found = Vec::new();
    for place in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let children = children(qmp, place)?;
        found.extend(
            children
                .into_iter()
                .filter(|(_, kind)| kind.contains("vhost-user"))
                .map(|(name, kind)| if name.starts_with("device[") { kind } else { format!("{name}, {kind}") }),
        );
    }
    let network = match qmp.execute("human-monitor-command", json!({"command-line": "info network"})) {
        Err(QmpError::Refused { .. }) => Value::Null,
        answer => answer?,
    };
    let lines = network.as_str().unwrap_or_default().lines().filter(|line| line.contains("vhost-user"));
    found.extend(lines.map(|line| line.trim_start_matches([' ', '\\']).split(':').next().unwrap_or(line).to_owned()));
    Ok(found)
}

/// Flash memories whose image the guest can write to.
fn writable_flash(qmp: &mut Qmp) -> Result<Vec<String>, QmpError> {
    let mut found = Vec::new();
    for (name, kind) in children(qmp, "/machine")? {
        if !kind.starts_with("cfi.pflash") {
            continue;
        }
        let path = format!("/machine/{name}");
        let drive = qmp.execute("qom-get", json!({"path": path, "property": "drive"}))?;
        let Some(drive) = drive.as_str().filter(|drive| !drive.is_empty()) else { continue };
        let blocks = qmp.execute("query-block", json!({}))?;
        let is_it = |block: &&Value| {
            block["device"] == drive || block["inserted"]["node-name"] == drive || block["qdev"] == path.as_str()
        };
        let read_only = blocks.as_array().into_iter().flatten().find(is_it).map(|block| &block["inserted"]["ro"]);
        if read_only != Some(&Value::Bool(true)) {
            found.push(name);
        }
    }
    Ok(found)
}

/// Names and types of what is below a place in QEMU's object tree.
fn children(qmp: &mut Qmp, place: &str) -> Result<Vec<(String, String)>, QmpError> {
    let list = match qmp.execute("qom-list", json!({"path": place})) {
        Err(QmpError::Refused { .. }) => return Ok(Vec::new()),
        answer => answer?,
    };
    let entries = list.as_array().into_iter().flatten();
    let child = |entry: &Value| {
        let kind = entry["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((entry["name"].as_str()?.to_owned(), kind.to_owned()))
    };
    Ok(entries.filter_map(child).collect())
}

/// A file that is mapped as shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    /// In bytes, all its pieces together.
    length: u64,
    /// Device, as the kernel prints it, and inode.
    file: (String, u64),
    writable: bool,
}

/// What a process has mapped and shares (proc_pid_maps(5)).
fn mappings(process: u32) -> Vec<Mapping> {
    let text = fs::read(format!("/proc/{process}/maps")).unwrap_or_default();
    let mut found: Vec<Mapping> = Vec::new();
    for map in String::from_utf8_lossy(&text).lines().filter_map(mapping) {
        match found.iter_mut().find(|other| other.file == map.file) {
            Some(other) => {
                other.length += map.length;
                other.writable |= map.writable;
            }
            None => found.push(map),
        }
    }
    found
}

fn mapping(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (from, to) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let (_, device, inode) = (words.next()?, words.next()?, words.next()?.parse().ok()?);
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let length = number(to)?.checked_sub(number(from)?)?;
    let shared = rights.ends_with('s') && inode != 0;
    shared.then(|| Mapping { length, file: (device.to_owned(), inode), writable: rights.contains('w') })
}

/// The other processes that can write to it, as far as we may see.
fn who_writes(map: &Mapping, qemu: u32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let others = ids.filter(|id| *id != qemu && mappings(*id).iter().any(|own| own.file == map.file && own.writable));
    others.filter_map(Process::find).collect()
}

/// How much of the file is there, in bytes; `None` if it can't be seen.
fn allocated(map: &Mapping, qemu: u32) -> Option<u64> {
    let fds = fs::read_dir(format!("/proc/{qemu}/fd")).ok()?.flatten();
    let mut files = fds.filter_map(|fd| fs::metadata(fd.path()).ok());
    let device = |number: u64| {
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        format!("{major:02x}:{minor:02x}")
    };
    let file = files.find(|file| file.ino() == map.file.1 && device(file.dev()) == map.file.0)?;
    Some(file.blocks().saturating_mul(512))
}

/// The memory that the host has to spare, in bytes (proc_meminfo(5)).
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = "7f01e0000000-7f01e2000000 rw-s 00000000 00:01 2063 /memfd:memory-backend-memfd (deleted)";
        let expected = Mapping { length: 32 << 20, file: ("00:01".into(), 2063), writable: true };
        assert_eq!(mapping(line), Some(expected));
        assert_eq!(mapping("7f01e0000000-7f01e2000000 rw-p 00000000 00:01 2063 /memfd:x"), None);
        assert_eq!(mapping("7f01e2000000-7f01e0000000 rw-s 00000000 00:01 2063"), None);
        assert_eq!(mapping("nonsense"), None);
    }
}
