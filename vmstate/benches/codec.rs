//! How fast a stream is read and written: RAM records, the description of the device state, and a device's section.
//!
//! `cargo bench -p vmstate`

#![expect(unreachable_pub, dead_code, reason = "the samples module is shared with tests")]

#[path = "../../testkit/src/samples.rs"]
mod samples;

use std::hint::black_box;
use std::io::Cursor;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use page_units::{ByteLen, FileOffset, PAGE_SIZE};
use vmstate::ram::{Record, RecordReader, RecordWriter};
use vmstate::{StreamReader, StreamWriter, VmDesc, find_vmdesc, walk};

/// Pages of one stream: every second one has content.
const PAGES: u64 = 1024;

fn write_records() -> Vec<u8> {
    let page = [7; 4096];
    let mut to = StreamWriter::new(Vec::new());
    let mut records = RecordWriter::new();
    for number in 0..PAGES {
        let at = ByteLen(number * PAGE_SIZE);
        if number % 2 == 0 {
            records.page(&mut to, "pc.ram", at).unwrap();
            to.bytes(&page).unwrap();
        } else {
            records.zero(&mut to, "pc.ram", at).unwrap();
        }
    }
    records.end(&mut to).unwrap();
    to.into_inner()
}

fn read_records(bytes: &[u8]) -> u64 {
    let mut from = StreamReader::nested(bytes, FileOffset(0));
    let mut records = RecordReader::new();
    let mut page = [0; 4096];
    let mut pages = 0;
    loop {
        match records.next(&mut from).unwrap() {
            Record::EndOfSection => return pages,
            Record::Page { .. } => from.read_exact(&mut page).unwrap(),
            _ => {}
        }
        pages += 1;
    }
}

fn ram_records(criterion: &mut Criterion) {
    let bytes = write_records();
    assert_eq!(read_records(&bytes), PAGES);
    let mut group = criterion.benchmark_group("ram_records");
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("write", |bencher| bencher.iter(write_records));
    group.bench_function("read", |bencher| bencher.iter(|| read_records(black_box(&bytes))));
    group.finish();
}

/// The description in a file that QEMU wrote, and the section of its first vCPU.
fn device_state(criterion: &mut Criterion) {
    let all = samples::stripped();
    let sample = all.iter().find(|sample| sample.name == "q10-pc-32-plain.mr").unwrap();
    let file = sample.bytes().unwrap();
    let end = FileOffset(file.len() as u64);
    let text = find_vmdesc(&mut Cursor::new(&file), FileOffset(0)..end).unwrap().unwrap();
    let vmdesc = VmDesc::parse(&text.value).unwrap();
    let cpu = vmdesc.device("cpu", 0).unwrap();
    // Behind the header of the section: its kind, number, name, instance and version.
    let sections = sample.golden["sections"].as_array().unwrap();
    let section = sections.iter().find(|section| section[2] == "cpu").unwrap();
    let start = usize::try_from(section[5].as_u64().unwrap()).unwrap() + 1 + 4 + 1 + "cpu".len() + 4 + 4;
    let body = &file[start..start + cpu.body_len().unwrap().get()];

    let mut group = criterion.benchmark_group("device_state");
    group.throughput(Throughput::Bytes(text.value.len() as u64));
    group
        .bench_function("parse_description", |bencher| bencher.iter(|| VmDesc::parse(black_box(&text.value)).unwrap()));
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("walk_cpu", |bencher| {
        bencher.iter(|| walk(black_box(body), FileOffset(0), cpu).unwrap().members().len());
    });
    group.finish();
}

criterion_group!(benches, ram_records, device_state);
criterion_main!(benches);
