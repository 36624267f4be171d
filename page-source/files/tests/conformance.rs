//! Files keep to the contract, as sources and as sinks.

use std::path::Path;
use std::sync::Arc;

use mapped_ram::Writer;
use page_files::{FlatBlock, FlatFile, FlatSink, MappedRam, MappedRamSink};
use page_source::conformance::{self, Made, Page, Suite};
use page_source::{PageSink, Threaded};
use page_units::{ByteLen, Layout, PageSize, RamBlock};
use testkit::oracle::Oracle;
use vmstate::{Configuration, DeviceWriter};

fn oracle() -> Arc<Oracle> {
    let block = |name: &str, pages: u64| RamBlock::new(name, ByteLen(pages * 4096), PageSize::SMALL).unwrap();
    let layout = Layout::new(vec![block("pc.ram", 300), block("rom", 2)]).unwrap();
    Arc::new(Oracle::random(11, layout, 120))
}

fn devices() -> Vec<u8> {
    DeviceWriter::new(2).finish("testkit").unwrap()
}

#[test]
fn files_are_sources_that_keep_to_the_contract() {
    let (oracle, dir) = (oracle(), tempfile::tempdir().unwrap());
    let truth = Arc::clone(&oracle);
    let suite = Suite::new(move |one| Page::Content(truth.run(one).to_vec()));
    let path = dir.path().join("snapshot");
    oracle.write_mapped_ram(&path, &Configuration::new("testkit"), &devices()).unwrap();
    let mapped_ram = MappedRam::open(&path).unwrap();
    suite.source(Arc::new(mapped_ram.clone())).unwrap();
    suite.source(Arc::new(Threaded::new(mapped_ram, 2))).unwrap();
    let path = dir.path().join("flat");
    let blocks: Vec<FlatBlock> = oracle.write_flat(&path).unwrap();
    let flat = FlatFile::open(&path, blocks).unwrap();
    suite.source(Arc::new(flat.clone())).unwrap();
    suite.source(Arc::new(flat.with_zero_scan(true))).unwrap();
}

fn flat(path: &Path, layout: &Layout) -> Made {
    let blocks = FlatBlock::concatenated(layout.blocks().to_vec()).unwrap();
    let sink = Arc::new(FlatSink::create(path, &blocks).unwrap());
    (Arc::clone(&sink) as Arc<dyn PageSink>, Box::new(move || sink.publish().is_ok()))
}

fn mapped_ram(path: &Path, layout: &Layout) -> Made {
    let writer = Writer::create(path, &Configuration::new("testkit"), layout.clone()).unwrap();
    let sink = Arc::new(MappedRamSink::new(writer));
    (Arc::clone(&sink) as Arc<dyn PageSink>, Box::new(move || sink.publish(&devices()).is_ok()))
}

#[test]
fn files_are_sinks_that_keep_to_the_contract() {
    let (oracle, dir) = (oracle(), tempfile::tempdir().unwrap());
    let path = dir.path().join("file");
    conformance::sink(oracle.layout(), || flat(&path, oracle.layout())).unwrap();
    conformance::sink(oracle.layout(), || mapped_ram(&path, oracle.layout())).unwrap();
}
