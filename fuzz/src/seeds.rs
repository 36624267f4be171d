//! What the corpora begin with, from the samples of the repository.

#[path = "../../testkit/src/samples.rs"]
#[expect(dead_code, reason = "shared with the tests, which use more of it")]
mod samples;

use mapped_ram::{Snapshot, Writer};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use vmstate::ram::RecordWriter;
use vmstate::{Command, Configuration, DeviceWriter, Event, Section, SectionHeader, StreamWriter};

use crate::SECOND_PART;

fn with_length(first: &[u8], second: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(first.len()).ok()?;
    Some([&length.to_le_bytes(), first, second].concat())
}

fn small_devices() -> Vec<u8> {
    let mut devices = DeviceWriter::new(3);
    let cpu = Section::builder("cpu", 0, 1)
        .u64s("regs", &[1, 2])
        .structure("cs", "segment", 1, |cs| cs.u16("selector", 3))
        .subsection("cpu/nmi", 1, |nmi| nmi.bool("pending", true));
    devices.push(cpu.build().expect("a section"));
    devices.finish("m").expect("device state")
}

/// One block of 16 pages, with small device state and with that of each sample.
pub fn snapshots() -> Vec<Vec<u8>> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut all = Vec::new();
    let mut add = |configuration: &Configuration, devices: &[u8]| {
        let ram = RamBlock::new("pc.ram", PageCount(16).to_bytes(), PageSize::SMALL).expect("a block");
        let layout = Layout::new(vec![ram]).expect("a layout");
        let path = directory.path().join("seed");
        let writer = Writer::create(&path, configuration, layout).expect("a writer");
        for page in [1, 2, 15] {
            writer.write(PageRun::single(BlockId(0), PageIndex(page)), &[9; 4096]).expect("writing");
        }
        writer.finish(devices).expect("a snapshot");
        let bytes = std::fs::read(&path).expect("reading");
        let second = usize::try_from(SECOND_PART).expect("an offset in memory");
        all.extend(with_length(&bytes[..300], &bytes[second..]));
    };
    add(&Configuration::new("m"), &small_devices());
    for sample in samples::stripped() {
        let snapshot = Snapshot::open(sample.unpack(directory.path()).expect("unpacking")).expect("a sample");
        add(snapshot.configuration(), &snapshot.read(snapshot.tail()).expect("reading"));
    }
    all
}

/// Each device of each sample with a description of its own.
pub fn descriptions() -> Vec<Vec<u8>> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut all = Vec::new();
    let lists = br#"{"devices": [{"name": "d", "vmsd_name": "d", "version": 1, "fields": [
        {"name": "list", "type": "qtailq", "vmsd_name": "e", "version": 1, "fields": [{"name": "x", "type": "uint8",
        "size": 1}], "vmsd_name": "e", "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1}], "size": 5},
        {"name": "a", "array_len": 2, "type": "struct", "struct": {"vmsd_name": "e", "version": 1, "fields":
        [{"name": "x", "type": "uint8", "size": 1}]}, "size": 1}]}]}"#;
    all.extend(with_length(lists, &[1, 10, 1, 11, 0, 20, 21]));
    for sample in samples::stripped() {
        let snapshot = Snapshot::open(sample.unpack(directory.path()).expect("unpacking")).expect("a sample");
        let text = snapshot.read(snapshot.device_state().end..snapshot.tail().end).expect("reading");
        let text: serde_json::Value = serde_json::from_slice(&text[6..]).expect("a description");
        for device in text["devices"].as_array().into_iter().flatten() {
            let name = device["name"].as_str().unwrap_or_default();
            let one = serde_json::json!({ "devices": [device] }).to_string();
            let body = snapshot.device(name, 0).expect("reading").map(|device| device.body().to_owned());
            all.extend(body.and_then(|body| with_length(one.as_bytes(), &body)));
        }
    }
    all
}

/// A small plain stream.
pub fn streams() -> Vec<Vec<u8>> {
    let mut out = StreamWriter::new(Vec::new());
    let mut records = RecordWriter::new();
    let written = (|| {
        out.event(&Event::Header)?;
        out.event(&Event::Configuration(Configuration::new("m")))?;
        out.command(&Command::Ping(1))?;
        let block = "pc.ram".to_owned();
        out.command(&Command::PostcopyRamDiscard { block, ranges: vec![(ByteLen(0), ByteLen(4096))] })?;
        out.event(&Event::SectionStart(SectionHeader { id: 2, name: "ram".into(), instance: 0, version: 4 }))?;
        records.page(&mut out, "pc.ram", ByteLen(0))?;
        out.bytes(&[7; 4096])?;
        records.zero(&mut out, "pc.ram", ByteLen(4096))?;
        records.end(&mut out)?;
        out.event(&Event::Footer { id: 2 })?;
        out.event(&Event::SectionEnd { id: 2 })?;
        records.end(&mut out)?;
        out.event(&Event::Footer { id: 2 })?;
        out.bytes(&small_devices())
    })();
    written.expect("a stream");
    vec![out.into_inner()]
}
