//! A device whose state is long, by what a small sparse file says, costs no more memory than it has bytes, or is refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use mapped_ram::{Snapshot, Writer};
use page_units::{ByteLen, Layout, PageSize, RamBlock};
use vmstate::{Configuration, Event, SectionHeader, StreamWriter};

/// A snapshot in which device `d` has a section for each of these instances: an array of a number of bytes, which are a hole
/// of the file.
fn with_arrays(path: &Path, length: u64, instances: &[u32]) {
    let small = path.with_extension("small");
    let describe = |length: u64| {
        let field = format!(r#"{{"name": "a", "type": "uint8", "array_len": {length:20}, "size": 1}}"#);
        let device = |instance| format!(r#"{{"name": "d", "instance_id": {instance}, "fields": [{field}]}}"#);
        let devices: Vec<String> = instances.iter().map(device).collect();
        format!(r#"{{"devices": [{}]}}"#, devices.join(", "))
    };
    let mut tail = StreamWriter::new(Vec::new());
    for instance in instances {
        let header = SectionHeader { id: 7, name: "d".into(), instance: *instance, version: 1 };
        tail.event(&Event::SectionFull(header)).unwrap();
        tail.event(&Event::Footer { id: 7 }).unwrap();
    }
    tail.event(&Event::Eof).unwrap();
    tail.event(&Event::VmDesc(describe(0).into_bytes())).unwrap();
    let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(4096), PageSize::SMALL).unwrap()]).unwrap();
    Writer::create(&small, &Configuration::new("m"), layout).unwrap().finish(&tail.into_inner()).unwrap();

    let mut bytes = std::fs::read(&small).unwrap();
    let text = describe(length);
    let text_at = bytes.len() - text.len();
    bytes.splice(text_at.., text.into_bytes());
    let snapshot = Snapshot::open(&small).unwrap();
    let bodies = snapshot.sections().iter().filter(|entry| entry.name == "d").map(|entry| entry.body.start.0);
    let cuts: Vec<u64> = [0].into_iter().chain(bodies).chain([bytes.len() as u64]).collect();
    let file = File::create(path).unwrap();
    for (before, cut) in (0..).zip(cuts.windows(2)) {
        let part = usize::try_from(cut[0]).unwrap()..usize::try_from(cut[1]).unwrap();
        file.write_all_at(&bytes[part], cut[0] + before * length).unwrap();
    }
}

/// Runs it with `kib` KiB of address space.
fn inspect(path: &Path, kib: u64, arguments: &str) -> Output {
    let script = format!("ulimit -v {kib} && exec \"$0\" inspect \"$1\" --device d {arguments}");
    Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_fastload")]).arg(path).output().unwrap()
}

#[test]
fn what_is_shown_costs_a_few_times_its_length() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    with_arrays(&path, 64 << 20, &[0]);
    let shown = inspect(&path, 1 << 20, "--json");
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    assert_eq!(shown.stdout.iter().filter(|byte| **byte == b'0').count() >> 20, 128, "all of it, in hexadecimal");
    let shown = inspect(&path, 512 << 10, "");
    assert!(shown.status.success() && shown.stdout.len() < 1000, "{}", String::from_utf8_lossy(&shown.stderr));
    assert!(String::from_utf8(shown.stdout).unwrap().contains("a: uint8 = 67108864 bytes 0000"));
    // This many are numbers.
    with_arrays(&path, 1000, &[0]);
    let shown: serde_json::Value = serde_json::from_slice(&inspect(&path, 1 << 20, "--json").stdout).unwrap();
    assert_eq!(shown["devices"][0]["fields"][0]["values"].as_array().map(Vec::len), Some(1000), "{shown}");
}

#[test]
fn what_is_longer_than_any_device_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    for (length, instances) in [(300 << 20, &[0][..]), (150 << 20, &[0, 1])] {
        with_arrays(&path, length, instances);
        for arguments in ["", "--json"] {
            let refused = inspect(&path, 256 << 10, arguments);
            assert_eq!(refused.status.code(), Some(1));
            let line = String::from_utf8(refused.stderr).unwrap();
            assert!(line.lines().count() == 1 && line.contains("314572800 bytes of device state"), "{line}");
        }
    }
}

#[test]
fn each_device_is_shown_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    with_arrays(&path, 10, &[3, 0, 3, 3, 1]);
    let shown: serde_json::Value = serde_json::from_slice(&inspect(&path, 1 << 20, "--json").stdout).unwrap();
    let instances: Vec<&serde_json::Value> =
        shown["devices"].as_array().unwrap().iter().map(|device| &device["instance"]).collect();
    assert_eq!(instances, [3, 0, 1]);
}
