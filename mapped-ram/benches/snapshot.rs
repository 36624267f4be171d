//! How long it takes to open a snapshot file, and to find out whether a page is stored.
//!
//! `cargo bench -p mapped-ram`

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mapped_ram::{Snapshot, Writer};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use vmstate::{Configuration, DeviceWriter, Section};

const BLOCK: BlockId = BlockId(0);
/// 16 GiB of RAM: 512 KiB of bitmap, which is read in 128 pieces.
const PAGES: u64 = 4 << 20;
/// Runs of eight pages: stored, zero, stored, ...
const RUN: u64 = 8;
/// From one stored run to the next.
const STEP: usize = 16;

/// A sparse file: its pages are marked as stored without being written.
fn write(path: &Path) {
    let ram = RamBlock::new("ram", PageCount(PAGES).to_bytes(), PageSize::SMALL).unwrap();
    let layout = Layout::new(vec![ram]).unwrap();
    let writer = Writer::create(path, &Configuration::new("bench"), layout).unwrap();
    for first in (0..PAGES).step_by(STEP) {
        writer.mark_stored(PageRun::new(BLOCK, PageIndex(first), PageCount(RUN)));
    }
    let mut devices = DeviceWriter::new(2);
    devices.push(Section::builder("cpu", 0, 1).u64("rip", 0xfff0).build().unwrap());
    writer.finish(&devices.finish("bench").unwrap()).unwrap();
}

fn open(criterion: &mut Criterion, path: &Path) {
    criterion.bench_function("open", |bencher| bencher.iter(|| Snapshot::open(black_box(path)).unwrap()));
}

fn look_up(criterion: &mut Criterion, path: &Path) {
    let snapshot = Snapshot::open(path).unwrap();
    assert_eq!(snapshot.stored_pages(BLOCK).unwrap(), PageCount(PAGES / 2));
    let mut group = criterion.benchmark_group("bitmap");
    group.bench_function("known_page", |bencher| {
        // A large odd step visits the pages in no order that a processor could guess.
        let mut page = 0;
        bencher.iter(|| {
            page = (page + 1_048_583) % PAGES;
            snapshot.known_run(BLOCK, PageIndex(page), PageCount(1))
        });
    });
    let window = PageCount(4096);
    group.throughput(Throughput::Elements(window.0));
    group.bench_function("known_runs_of_16_mib", |bencher| {
        bencher.iter(|| {
            let (mut page, mut stored) = (PageIndex(0), 0);
            while page.0 < window.0 {
                let known = snapshot.known_run(BLOCK, page, PageCount(window.0 - page.0));
                let run = known.unwrap();
                stored += if run.is_stored() { run.pages().0 } else { 0 };
                page += run.pages();
            }
            stored
        });
    });
    group.throughput(Throughput::Elements(PAGES));
    group.sample_size(20);
    group.bench_function("open_and_load_all", |bencher| {
        bencher.iter(|| Snapshot::open(path).unwrap().stored_pages(BLOCK).unwrap());
    });
    group.finish();
}

fn all(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write(&path);
    open(criterion, &path);
    look_up(criterion, &path);
}

criterion_group!(benches, all);
criterion_main!(benches);
