//! What a loader wants to know of a QEMU: capabilities, RAM blocks.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{Qmp, QmpError};

/// The migration capabilities of a QEMU, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(pub BTreeMap<String, bool>);

/// A RAM block as QEMU lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestBlock {
    /// Its name; empty for memory that does not migrate.
    pub name: String,
    /// The page size of its backing, in bytes.
    pub page_size: u64,
    /// Its length now, in bytes.
    pub used: u64,
    /// The length it may grow to, in bytes: more than `used` only for a resizable block.
    pub most: u64,
}

/// A file that QEMU has open for a disk, a CD-ROM or a flash memory of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    /// The block node that has it.
    pub node: String,
    /// Its name, as QEMU knows it.
    pub file: String,
    /// Whether the guest's writes go there.
    pub writable: bool,
}

/// A `memory-backend-...` object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Its name; empty if it has none.
    pub id: String,
    /// Its length, in bytes.
    pub size: u64,
    /// Whether its memory is shared (`share=on`).
    pub share: bool,
    /// Whether the kernel may merge equal pages of it (`merge=on`).
    pub merge: bool,
}

impl Qmp {
    /// The machine type by its full name, e.g. `pc-i440fx-10.0`.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn machine(&mut self) -> Result<String, QmpError> {
        let class = self.execute("qom-get", json!({"path": "/machine", "property": "type"}))?;
        let class = class.as_str().ok_or_else(|| misunderstood("qom-get", "no type name"))?;
        Ok(class.strip_suffix("-machine").unwrap_or(class).to_owned())
    }

    /// The run state, e.g. `running`, `inmigrate`.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn run_state(&mut self) -> Result<String, QmpError> {
        let status = self.execute("query-status", json!({}))?;
        let status = status["status"].as_str().ok_or_else(|| misunderstood("query-status", "no status"))?;
        Ok(status.to_owned())
    }

    /// The state of the migration, e.g. `postcopy-active`, and QEMU's explanation if there is one. `none` if there
    /// is no migration.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn migration(&mut self) -> Result<(String, Option<String>), QmpError> {
        let info = self.execute("query-migrate", json!({}))?;
        let why = info["error-desc"].as_str().map(str::to_owned);
        Ok((info["status"].as_str().unwrap_or("none").to_owned(), why))
    }

    /// Where it listens, or has listened, for the migration that is under way, as QEMU writes addresses: `unix:PATH`,
    /// `tcp:HOST:PORT`.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn listening(&mut self) -> Result<Vec<String>, QmpError> {
        let info = self.execute("query-migrate", json!({}))?;
        let addresses = info["socket-address"].as_array().into_iter().flatten().filter_map(|address| {
            let text = |name: &str| address[name].as_str();
            match text("type")? {
                "unix" => Some(format!("unix:{}", text("path")?)),
                "inet" => Some(format!("tcp:{}:{}", text("host")?, text("port")?)),
                _ => None,
            }
        });
        Ok(addresses.collect())
    }

    /// All migration capabilities.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn capabilities(&mut self) -> Result<Capabilities, QmpError> {
        let list = self.execute("query-migrate-capabilities", json!({}))?;
        let list = list.as_array().ok_or_else(|| misunderstood("query-migrate-capabilities", "not a list"))?;
        let pairs = list.iter().filter_map(|entry| {
            let name = entry["capability"].as_str()?;
            Some((name.to_owned(), entry["state"].as_bool()?))
        });
        Ok(Capabilities(pairs.collect()))
    }

    /// Sets those of `wanted` that differ from `now`, in one command. Nothing is sent if none does.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute); QEMU then has changed nothing.
    pub fn set_capabilities(&mut self, now: &Capabilities, wanted: &Capabilities) -> Result<(), QmpError> {
        let differ = wanted.0.iter().filter(|(name, state)| now.0.get(*name) != Some(*state));
        let list: Vec<Value> = differ.map(|(name, state)| json!({"capability": name, "state": state})).collect();
        if list.is_empty() {
            return Ok(());
        }
        self.execute("migrate-set-capabilities", json!({"capabilities": list})).map(drop)
    }

    /// The files that QEMU has open for the guest's disks.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn image_files(&mut self) -> Result<Vec<ImageFile>, QmpError> {
        let nodes = self.execute("query-named-block-nodes", json!({"flat": true}))?;
        let files = nodes.as_array().into_iter().flatten().filter_map(|node| {
            if !matches!(node["drv"].as_str()?, "file" | "host_device") {
                return None;
            }
            let file = node["file"].as_str()?;
            let file = file.strip_prefix("file:").unwrap_or(file).to_owned();
            let (name, writable) = (node["node-name"].as_str().unwrap_or_default(), node["ro"] == false);
            Some(ImageFile { node: name.to_owned(), file, writable })
        });
        Ok(files.collect())
    }

    /// The objects that guest memory is made of; none of a QEMU that does not tell.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn memory_backends(&mut self) -> Result<Vec<MemoryBackend>, QmpError> {
        let list = match self.execute("query-memdev", json!({})) {
            Err(QmpError::Refused { .. }) => return Ok(Vec::new()),
            answer => answer?,
        };
        let backends = list.as_array().into_iter().flatten().filter_map(|backend| {
            let id = backend["id"].as_str().unwrap_or_default().to_owned();
            Some(MemoryBackend {
                id,
                size: backend["size"].as_u64()?,
                share: backend["share"] == true,
                merge: backend["merge"] == true,
            })
        });
        Ok(backends.collect())
    }

    /// The RAM blocks that migrate.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn ram_blocks(&mut self) -> Result<Vec<GuestBlock>, QmpError> {
        let text = match self.execute("x-query-ramblock", json!({})) {
            Err(error) if error.is_unknown_command() => {
                self.execute("human-monitor-command", json!({"command-line": "info ramblock"}))?
            }
            answer => answer?["human-readable-text"].take(),
        };
        let text = text.as_str().ok_or_else(|| misunderstood("x-query-ramblock", "no text"))?;
        let blocks = parse_ram_blocks(text).ok_or_else(|| misunderstood("x-query-ramblock", "an unknown table"))?;
        Ok(blocks.into_iter().filter(|block| !block.name.is_empty()).collect())
    }
}

fn misunderstood(command: &str, reason: &str) -> QmpError {
    QmpError::Answer { command: command.to_owned(), reason: reason.to_owned() }
}

/// Reads the table of `info ramblock` (QEMU system/physmem.c, `ram_block_format`): name, page size such as `4 KiB`,
/// then offset, used and total length in hexadecimal. `None` if it is not that table.
#[must_use]
pub fn parse_ram_blocks(table: &str) -> Option<Vec<GuestBlock>> {
    let mut lines = table.lines();
    if !lines.next()?.contains("Block Name") {
        return None;
    }
    lines.filter(|line| !line.trim().is_empty()).map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<GuestBlock> {
    // The name is first and may hold spaces: everything before the page size, which ends in "iB" or "B".
    let words: Vec<&str> = line.split_whitespace().collect();
    let unit_at = words.iter().rposition(|word| matches!(*word, "B" | "KiB" | "MiB" | "GiB"))?;
    let number: u64 = words.get(unit_at.checked_sub(1)?)?.parse().ok()?;
    let shift = match *words.get(unit_at)? {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        _ => 30,
    };
    let page_size = number.checked_mul(1 << shift)?;
    let hex = |at: usize| u64::from_str_radix(words.get(at)?.strip_prefix("0x")?, 16).ok();
    let name = words.get(..unit_at - 1)?.join(" ");
    Some(GuestBlock { name, page_size, used: hex(unit_at + 2)?, most: hex(unit_at + 3)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_real_qemu_is_parsed() {
        let table = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
                     \x20                 pc.ram    2 MiB  0x0000000000000000 0x0000000002000000 0x0000000002000000 0x00007f6f9be00000  rw\n\
                     \x20   /rom@etc/acpi/tables    4 KiB  0x0000000002080000 0x0000000000020000 0x0000000000200000 0x00007f6f9ba00000  ro\n";
        let blocks = parse_ram_blocks(table).unwrap();
        let block = |name: &str, page_size, used, most| GuestBlock { name: name.into(), page_size, used, most };
        assert_eq!(
            blocks,
            [
                block("pc.ram", 2 << 20, 0x200_0000, 0x200_0000),
                block("/rom@etc/acpi/tables", 4096, 0x2_0000, 0x20_0000)
            ]
        );
        assert_eq!(parse_ram_blocks("nonsense\n"), None);
        assert_eq!(parse_ram_blocks("Block Name\n 4 KiB 0x1\n"), None);
    }
}
