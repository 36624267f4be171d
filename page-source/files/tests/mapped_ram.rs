//! mapped-ram files, written and read: against the oracle, and against what QEMU wrote.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use mapped_ram::{Snapshot, Writer};
use page_files::{MappedRam, MappedRamSink};
use page_source::{Content, PageSink, PageSource, Pages, PumpOptions, Reply, SourceErrorKind, Threaded, Urgency, pump};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use testkit::collector::{Collector, Got};
use testkit::faults::{Fault, FaultySource};
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::samples;
use testkit::source::MemorySource;
use vmstate::{Configuration, DeviceWriter};

fn devices() -> Vec<u8> {
    DeviceWriter::new(2).finish("testkit").unwrap()
}

fn sink(path: &Path, oracle: &Oracle) -> Arc<MappedRamSink> {
    let writer = Writer::create(path, &Configuration::new("testkit"), oracle.layout().clone()).unwrap();
    Arc::new(MappedRamSink::new(writer))
}

fn written(dir: &Path, oracle: &Oracle) -> std::path::PathBuf {
    let path = dir.join("snapshot");
    oracle.write_mapped_ram(&path, &Configuration::new("testkit"), &devices()).unwrap();
    path
}

/// Everything a source has, in one request per block, checked against the oracle.
fn assert_equal(source: &dyn PageSource, oracle: &Oracle) {
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    for run in source.layout().runs() {
        feed.request(run, Urgency::Background);
    }
    feed.finish().unwrap();
    assert_eq!(source.layout(), oracle.layout());
    for (id, block) in oracle.layout().iter() {
        assert!(sink.content(source.layout(), id) == oracle.block(id), "block {}", block.name());
    }
    for (run, kind) in &sink.state.lock().runs {
        let zero = *kind == "zero";
        assert!(run.iter().all(|page| oracle.zero_at(run.block, page) == zero), "{run} is not all {kind}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_any_source_writes_is_read_back(
        seed: u64, stored: u8, threads in 1_usize..4, late: bool, piece in 1_u64..300,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let oracle = Arc::new(Oracle::random(seed, Oracle::random_layout(seed, 2000), stored));
        let path = dir.path().join("snapshot");
        let source: Arc<dyn PageSource> = match late {
            true => Arc::new(LateSource::new(Arc::clone(&oracle), seed).with_threads(threads)),
            false => Arc::new(MemorySource::new(Arc::clone(&oracle)).knowing_nothing()),
        };
        let sink = sink(&path, &oracle);
        let options = PumpOptions { threads, piece: PageCount(piece), find_zeros: true, ..PumpOptions::default() };
        let pumped = pump(source, Arc::clone(&sink) as Arc<dyn PageSink>, &options).unwrap();
        sink.publish(&devices()).unwrap();
        prop_assert_eq!(pumped.stored, oracle.stored_pages());
        assert_equal(&MappedRam::open(&path).unwrap(), &oracle);
    }

    #[test]
    fn requests_in_any_order_and_size_are_answered(
        seed: u64, stored: u8, requests in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 1..200),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let oracle = Oracle::random(seed, Oracle::random_layout(seed, 2000), stored);
        let source = MappedRam::open(written(dir.path(), &oracle)).unwrap();
        let threaded = Threaded::new(source.clone(), 2);
        for source in [&source as &dyn PageSource, &threaded] {
            let sink = Collector::new();
            let feed = source.start(sink.clone()).unwrap();
            let mut asked = std::collections::BTreeMap::<(u32, u64), usize>::new();
            for (at, pages, demand) in &requests {
                let runs: Vec<_> = oracle.layout().runs().filter(|run| !run.is_empty()).collect();
                let all = runs[usize::try_from(at % runs.len() as u64).unwrap()];
                let first = at / 7 % all.pages.0;
                let pages = if *demand { 1 } else { 1 + pages % (all.pages.0 - first) };
                let urgency = if *demand { Urgency::Demand } else { Urgency::Background };
                feed.request(PageRun::new(all.block, PageIndex(first), PageCount(pages)), urgency);
                (first..first + pages).for_each(|page| *asked.entry((all.block.0, page)).or_default() += 1);
            }
            let total: usize = asked.values().sum();
            while sink.state.lock().pages.values().map(Vec::len).sum::<usize>() < total {
                std::thread::yield_now();
            }
            drop(feed);
            let state = sink.state.lock();
            for ((block, page), times) in asked {
                let id = (BlockId(block), PageIndex(page));
                let bytes = oracle.run(PageRun::single(id.0, id.1));
                let expected = if oracle.zero_at(id.0, id.1) { Got::Zero } else { Got::Data(bytes.to_vec()) };
                prop_assert_eq!(state.pages[&id].len(), times);
                prop_assert!(state.pages[&id].iter().all(|got| *got == expected));
            }
        }
    }
}

#[test]
fn stale_bytes_of_clear_pages_are_zero() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Oracle::random(7, Oracle::random_layout(7, 2000), 100);
    let path = written(dir.path(), &oracle);
    let snapshot = Snapshot::open(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    for (run, zero) in oracle.layout().runs().flat_map(|run| oracle.kinds(run)) {
        if zero {
            let offset = snapshot.page_offset(run.block, run.first).unwrap();
            file.write_all_at(&vec![0xee; run.len().get()], offset.0).unwrap();
        }
    }
    assert!(MappedRam::new(Arc::new(snapshot)).is_err(), "it has changed since it was opened");
    assert_equal(&MappedRam::open(&path).unwrap(), &oracle);
}

#[test]
fn what_is_zero_is_known_after_the_first_look() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Oracle::random(3, Oracle::random_layout(3, 2000), 100);
    let source = MappedRam::open(written(dir.path(), &oracle)).unwrap();
    assert_eq!(source.content(PageRun::single(BlockId(0), PageIndex(0))).content, Content::Unknown);
    let sink = Collector::new();
    source.start(sink).unwrap().request(PageRun::single(BlockId(0), PageIndex(0)), Urgency::Demand);
    let mut at = PageIndex(0);
    for (run, zero) in oracle.kinds(oracle.layout().run_of(BlockId(0)).unwrap()) {
        let rest = PageRun::new(BlockId(0), at, PageCount(u64::MAX - at.0));
        let span = source.content(rest);
        assert_eq!((span.content == Content::Zero, span.pages), (zero, run.pages));
        at = run.end();
    }
    assert_eq!(source.content(PageRun::single(BlockId(0), at)).pages, PageCount(0));
}

#[test]
fn what_qemu_wrote_is_read_exactly() {
    for sample in samples::stripped().into_iter().chain(samples::full()).filter(samples::Sample::is_mapped_ram) {
        let dir = tempfile::tempdir().unwrap();
        let source = match MappedRam::open(sample.unpack(dir.path()).unwrap()) {
            Ok(source) => source,
            Err(error) => {
                assert!(
                    sample.name.contains("bgmr") && error.to_string().contains("repair"),
                    "{}: {error}",
                    sample.name
                );
                continue;
            }
        };
        let sink = Collector::new();
        let feed = source.start(sink.clone()).unwrap();
        source.layout().runs().for_each(|run| _ = feed.request(run, Urgency::Background));
        for ((id, block), golden) in source.layout().iter().zip(sample.golden["blocks"].as_array().unwrap()) {
            let what = format!("{}: {}", sample.name, block.name());
            if !source.snapshot().block(id).unwrap().in_file {
                assert!(sink.failures().iter().all(|why| why.contains("x-ignore-shared")), "{what}");
                continue;
            }
            let content = sink.content(source.layout(), id);
            let sum: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(golden["ram_sha256"], sum, "{what}");
        }
    }
}

#[test]
fn a_fault_leaves_no_file_and_neither_does_a_flow_that_is_not_published() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Arc::new(Oracle::random(5, Oracle::random_layout(5, 2000), 200));
    let path = dir.path().join("snapshot");
    let late = LateSource::new(Arc::clone(&oracle), 5);
    for fault in [Fault::Error, Fault::Short, Fault::Panic, Fault::Silence, Fault::Broken] {
        let source = FaultySource::new(Arc::new(late.clone()), 9, fault);
        let sink = sink(&path, &oracle);
        assert!(sink.publish(&devices()).unwrap_err().to_string().contains("not ended yet"));
        assert!(pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default()).is_err());
        assert!(sink.publish(&devices()).is_err());
    }
    let stopped = sink(&path, &oracle);
    let feed = late.start(Arc::clone(&stopped) as Arc<dyn PageSink>).unwrap();
    feed.finish().unwrap();
    assert!(stopped.publish(&devices()).unwrap_err().to_string().contains("not all pages"));
    let complete = sink(&path, &oracle);
    pump(Arc::new(late), Arc::clone(&complete) as Arc<dyn PageSink>, &PumpOptions::default()).unwrap();
    drop((complete, stopped));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_file_truncated_at_an_exact_page_fails_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = (0..256 * 4096).map(|i| u8::try_from(i / 4096 % 255).unwrap() + 1).collect();
    let oracle = Oracle::new([("pc.ram", bytes)]).unwrap();
    let path = written(dir.path(), &oracle);
    let source = MappedRam::open(&path).unwrap();
    let cut = source.snapshot().page_offset(BlockId(0), PageIndex(100)).unwrap();
    let sink = Collector::with_hook(move |run| {
        if run.contains(PageIndex(90)) {
            File::options().write(true).open(&path).unwrap().set_len(cut.0).unwrap();
        }
        Reply::Taken
    });
    let feed = source.start(sink.clone()).unwrap();
    for page in 0..256 {
        feed.request(PageRun::single(BlockId(0), PageIndex(page)), Urgency::Demand);
    }
    for page in 0..256 {
        match sink.once(0, page) {
            Got::Failed(why) => {
                assert!(page > 90, "{why}");
                let offset = format!("{:#x}", cut.0 - 100 * 4096 + page * 4096);
                assert!(why.contains("/snapshot: ") && why.contains("\"pc.ram\"") && why.contains(&offset), "{why}");
            }
            // Nobody may have looked at the file yet.
            got if page < 100 => assert_eq!(got, Got::Data(oracle.block(BlockId(0))[page_range(page)].to_vec())),
            got => panic!("page {page}, which is gone: {got:?}"),
        }
    }
    assert_eq!(feed.finish().unwrap_err().kind(), SourceErrorKind::Changed);
}

fn page_range(page: u64) -> std::ops::Range<usize> {
    let start = usize::try_from(page * 4096).unwrap();
    start..start + 4096
}

#[test]
fn a_snapshot_at_an_offset_is_opened_where_it_is_said_to_be() {
    let sample = samples::stripped().into_iter().find(|sample| sample.name.contains("offset-unaligned")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = sample.unpack(dir.path()).unwrap();
    let at =
        |base| MappedRam::open_with(&path, &mapped_ram::Options::default().with_base(page_units::FileOffset(base)));
    let (told, found) = (at(0x1234).unwrap(), MappedRam::open(&path).unwrap());
    assert_eq!(told.snapshot().base().0, 0x1234);
    assert_eq!(told.layout(), found.layout());
    assert_eq!(at(0).unwrap_err().kind(), SourceErrorKind::Corrupt);
}
