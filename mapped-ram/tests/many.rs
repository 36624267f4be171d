//! Files that claim more than anybody has: what they cost depends on what is really there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mapped_ram::{Snapshot, Writer};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use vmstate::{
    Configuration, ConfigurationSubsection, DeviceWriter, Event, Section, SectionHeader, SectionKind, StreamWriter,
};

/// A file with many sections without a body.
fn sections(path: &Path, names: impl Iterator<Item = u32>, description: &str) {
    let layout = Layout::new(vec![RamBlock::new("ram", PageCount(1).to_bytes(), PageSize::SMALL).unwrap()]).unwrap();
    let mut tail = StreamWriter::new(Vec::new());
    for (id, instance) in (1000..).zip(names) {
        let header = SectionHeader { id, name: "d".into(), instance, version: 1 };
        tail.event(&Event::SectionFull(header)).unwrap();
        tail.event(&Event::Footer { id }).unwrap();
    }
    tail.event(&Event::Eof).unwrap();
    tail.event(&Event::VmDesc(description.as_bytes().to_vec())).unwrap();
    let mut configuration = Configuration::new("m");
    configuration.subsections.push(ConfigurationSubsection::Capabilities(vec!["mapped-ram".into()]));
    Writer::create(path, &configuration, layout).unwrap().finish(&tail.into_inner()).unwrap();
}

/// A look at all devices, all sections, or all fields of one device for each section would take hours.
#[test]
fn many_sections_cost_no_more_each() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let devices: Vec<String> = (0..200_000).map(|at| format!(r#"{{"name": "d", "instance_id": {at}}}"#)).collect();
    sections(&path, (0..200_000).rev(), &format!(r#"{{"devices": [{}]}}"#, devices.join(",")));
    let snapshot = Snapshot::open(&path).unwrap();
    for at in 0..200_000 {
        let device = snapshot.device("d", at).unwrap().unwrap();
        assert_eq!((device.entry().instance, device.body().len()), (at, 0));
    }
    assert!(snapshot.device("d", 200_000).unwrap().is_none() && snapshot.device("e", 0).unwrap().is_none());

    let fields = vec![r#"{"size": 0}"#; 200_000].join(",");
    sections(
        &path,
        (0..500_000).map(|at| at % 3),
        &format!(
            r#"{{"devices": [{{"name": "d", "fields": [{fields}]}},
        {{"name": "d", "instance_id": 1}}, {{"name": "d", "instance_id": 2}}]}}"#
        ),
    );
    let snapshot = Snapshot::open(&path).unwrap();
    let first = &snapshot.sections()[1..4];
    for entry in first.iter().filter(|entry| entry.kind == SectionKind::Full) {
        assert_eq!(snapshot.device("d", entry.instance).unwrap().unwrap().entry().range, entry.range);
    }
}

/// A terabyte of device state that takes no space in the file takes none in memory.
#[test]
fn state_of_any_length_in_a_sparse_file_takes_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let (small, path) = (directory.path().join("small"), directory.path().join("file"));
    let describe = |size: u64| format!(r#"{{"devices": [{{"name": "d", "fields": [{{"size": {size:20}}}]}}]}}"#);
    sections(&small, std::iter::once(0), &describe(0));
    let snapshot = Snapshot::open(&small).unwrap();
    let body = snapshot.sections().last().unwrap().body.start.0;
    let (bytes, text) = (std::fs::read(&small).unwrap(), describe(1 << 40));
    let behind = [&bytes[usize::try_from(body).unwrap()..bytes.len() - text.len()], text.as_bytes()].concat();
    let file = File::create(&path).unwrap();
    file.write_all_at(&bytes[..usize::try_from(body).unwrap()], 0).unwrap();
    file.write_all_at(&behind, body + (1 << 40)).unwrap();

    let snapshot = Snapshot::open(&path).unwrap();
    let entry = snapshot.sections().last().unwrap();
    assert_eq!((entry.body.end - entry.body.start).0, 1 << 40);
    for error in [snapshot.device("d", 0).unwrap_err(), snapshot.read(snapshot.tail()).unwrap_err()] {
        assert!(error.to_string().contains("more than 1073741824 at once"), "{error}");
    }
}

/// Bytes that this thread has read from files so far (proc(5), `/proc/pid/io`), those of the answer included.
fn bytes_read() -> u64 {
    let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

/// What opening reads does not depend on how much RAM there is; of a bitmap, what is needed is read when it is.
#[test]
fn opening_reads_the_description_and_no_bitmap() {
    let directory = tempfile::tempdir().unwrap();
    let mut read = Vec::new();
    for ram in [ByteLen(64 << 20), ByteLen(64 << 30)] {
        let path = directory.path().join("file");
        let layout = Layout::new(vec![RamBlock::new("ram", ram, PageSize::SMALL).unwrap()]).unwrap();
        let writer = Writer::create(&path, &Configuration::new("m"), layout).unwrap();
        writer.write(PageRun::single(BlockId(0), PageIndex(1)), &[7; 4096]).unwrap();
        let mut devices = DeviceWriter::new(2);
        devices.push(Section::builder("example", 0, 1).u64("counter", 42).build().unwrap());
        writer.finish(&devices.finish("m").unwrap()).unwrap();

        let asking = bytes_read();
        let before = bytes_read();
        let asking = before - asking;
        let snapshot = Snapshot::open(&path).unwrap();
        let opened = bytes_read();
        // 2 MiB of bitmap are those of 64 GiB.
        let stored = snapshot.load_run(BlockId(0), PageIndex(1), PageCount(1)).unwrap().is_stored();
        let looked = bytes_read() - opened - asking;
        assert!(stored && looked <= 4096 + 64, "{looked} bytes for one page of {ram}");
        read.push(opened - before - asking);
    }
    let [small, large] = read[..] else { unreachable!("two sizes") };
    assert!(small.abs_diff(large) < 64 && large < 64 << 10, "{small} and {large} bytes");
}
