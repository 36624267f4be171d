//! Compressed snapshots give the same pages as the plain files that they were made from, or name what is wrong.

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use frame_file::{Codec, Cuts, FrameWriter, compress};
use mapped_ram::Snapshot;
use page_files::MappedRam;
use page_source::conformance::{Page, Suite};
use page_source::{Collect, Content, PageSource, Pages, SourceErrorKind, Threaded, Urgency};
use page_units::{BlockId, ByteLen, FileOffset, Layout, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use proptest::prelude::*;
use testkit::oracle::Oracle;
use testkit::samples;
use vmstate::{Configuration, DeviceWriter};

const CODECS: [Codec; 2] = [Codec::Zstd { level: 1 }, Codec::Lz4];

fn plain(dir: &Path, oracle: &Oracle) -> PathBuf {
    let path = dir.join("plain");
    let devices = DeviceWriter::new(2).finish("testkit").unwrap();
    oracle.write_mapped_ram(&path, &Configuration::new("testkit"), &devices).unwrap();
    path
}

/// As `fastload compress` does it.
fn compressed(plain: &Path, codec: Codec, frame: ByteLen) -> PathBuf {
    let path = plain.with_extension(codec.name());
    let snapshot = Snapshot::open(plain).unwrap();
    let starts = snapshot.layout().iter().map(|(id, _)| snapshot.block(id).unwrap().pages_offset);
    let cuts = Cuts::every(frame, snapshot.length()).with_starts(starts);
    let mut writer = FrameWriter::new(File::create(&path).unwrap(), codec, frame);
    compress(snapshot.plain_file().unwrap(), &cuts, codec, NonZeroUsize::new(2).unwrap(), &mut writer, |_| {}).unwrap();
    writer.finish().unwrap();
    path
}

fn assert_equal(source: &dyn PageSource, oracle: &Oracle) {
    let sink = Collect::new(source.layout());
    let feed = source.start(sink.clone()).unwrap();
    for run in source.layout().runs() {
        feed.request(run, Urgency::Background);
    }
    feed.finish().unwrap();
    assert_eq!(source.layout(), oracle.layout());
    for run in oracle.layout().runs() {
        assert!(sink.bytes(run).as_deref() == Some(oracle.run(run)), "{run}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_page_is_the_one_of_the_plain_file_in_any_order(
        seed: u64, stored: u8, lz4: bool, pages in prop::sample::select(vec![1_u64, 2, 4, 16]),
        requests in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 1..100),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let oracle = Oracle::random(seed, Oracle::random_layout(seed, 1000), stored);
        let path = compressed(&plain(dir.path(), &oracle), CODECS[usize::from(lz4)], ByteLen(pages * PAGE_SIZE));
        let source = MappedRam::open(&path).unwrap();
        assert_equal(&source, &oracle);
        let sink = Collect::new(source.layout());
        let feed = source.start(sink.clone()).unwrap();
        let mut asked = Vec::new();
        for (at, length, demand) in requests {
            let runs: Vec<PageRun> = source.layout().runs().collect();
            let block = runs[usize::try_from(at % runs.len() as u64).unwrap()];
            let first = (at >> 8) % block.pages.0;
            let run = PageRun::new(block.block, PageIndex(first), PageCount(1 + length % (block.pages.0 - first)));
            feed.request(run, if demand { Urgency::Demand } else { Urgency::Background });
            asked.push(run);
            for page in run.iter() {
                let known = source.content(PageRun::single(run.block, page)).content;
                prop_assert_eq!(known == Content::Zero, oracle.zero_at(run.block, page));
            }
        }
        feed.finish().unwrap();
        // What was asked for has come, and what came unasked is right as well.
        for run in source.layout().runs() {
            for page in run.iter().map(|page| PageRun::single(run.block, page)) {
                match sink.bytes(page) {
                    Some(bytes) => prop_assert!(bytes == oracle.run(page), "{page}"),
                    None => prop_assert!(!asked.iter().any(|asked| !asked.intersect(page).is_empty()), "{page}"),
                }
            }
        }
    }
}

#[test]
fn what_qemu_saved_is_described_alike_and_the_real_programs_give_it_back() {
    testkit::require!(Zstd, Lz4);
    let dir = tempfile::tempdir().unwrap();
    for sample in samples::stripped().iter().filter(|sample| sample.is_mapped_ram()) {
        let path = sample.unpack(dir.path()).unwrap();
        let Ok(old) = Snapshot::open(&path) else { continue };
        for codec in CODECS {
            let packed = compressed(&path, codec, ByteLen(64 << 10));
            let new = Snapshot::open(&packed).unwrap();
            assert!(old.frames().is_none() && new.frames().is_some());
            assert_eq!((old.layout(), old.sections()), (new.layout(), new.sections()), "{}", sample.name);
            assert_eq!((old.length(), old.base(), old.tail()), (new.length(), new.base(), new.tail()));
            assert!(old.read(old.tail()).unwrap() == new.read(new.tail()).unwrap());
            for (id, _) in old.layout().iter() {
                assert_eq!(old.stored_pages(id).unwrap(), new.stored_pages(id).unwrap());
            }
            let decoded = Command::new(codec.name()).arg("-dc").arg(&packed).output().unwrap();
            assert!(decoded.status.success() && decoded.stdout == std::fs::read(&path).unwrap(), "{}", sample.name);
            std::fs::remove_file(packed).unwrap();
        }
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_corrupt_frame_fails_its_own_pages_and_says_which_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Oracle::random(5, Oracle::random_layout(5, 600), 200);
    for codec in CODECS {
        let path = compressed(&plain(dir.path(), &oracle), codec, ByteLen(4 * PAGE_SIZE));
        let snapshot = Snapshot::open(&path).unwrap();
        let (block, page) = (0..oracle.layout().blocks().len())
            .find_map(|id| {
                let id = BlockId(u32::try_from(id).unwrap());
                let pages = oracle.layout().get(id)?.pages();
                (0..pages.0).map(PageIndex).find(|page| !oracle.zero_at(id, *page)).map(|page| (id, page))
            })
            .unwrap();
        let at = snapshot.block(block).unwrap().pages_offset + page.byte_offset();
        let frame = snapshot.frames().unwrap().frame_at(at).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let broken = usize::try_from((frame.encoded().start.0 + frame.encoded().end.0) / 2).unwrap();
        bytes[broken] ^= 0x10;
        std::fs::write(&path, &bytes).unwrap();

        let source = MappedRam::open(&path).unwrap();
        let sink = Collect::new(source.layout());
        let feed = source.start(sink.clone()).unwrap();
        for run in source.layout().runs() {
            feed.request(run, Urgency::Background);
        }
        drop(feed);
        let failed = sink.failed();
        assert!(!failed.is_empty());
        let base = snapshot.block(block).unwrap().pages_offset;
        for (id, ram) in oracle.layout().iter() {
            for page in (0..ram.pages().0).map(PageIndex) {
                let offset = base.checked_add(page.byte_offset()).unwrap();
                let inside = id == block && frame.decoded().contains(&offset) && !oracle.zero_at(id, page);
                let run = PageRun::single(id, page);
                assert_eq!(inside, failed.iter().any(|(failed, _)| !failed.intersect(run).is_empty()), "{run}");
                assert!(inside || sink.bytes(run).as_deref() == Some(oracle.run(run)), "{run}");
            }
        }
        for (_, error) in failed {
            assert_eq!(error.kind(), SourceErrorKind::Corrupt);
            let said = error.to_string();
            let number = format!("frame {} at offset {}", frame.number(), frame.encoded().start);
            let name = oracle.layout().get(block).unwrap().name();
            for part in [name, &number, path.to_str().unwrap(), "digest"] {
                assert!(said.contains(part), "{part:?} is not in {said:?}");
            }
        }
    }
}

#[test]
fn no_flipped_bit_anywhere_gives_a_wrong_page() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Oracle::random(3, Oracle::random_layout(3, 24), 150);
    for codec in CODECS {
        let path = compressed(&plain(dir.path(), &oracle), codec, ByteLen(2 * PAGE_SIZE));
        let good = std::fs::read(&path).unwrap();
        // Every byte of the metadata and of what follows the frames, and some of each frame.
        let step = |at: usize| if good.len() - at < 1200 { 1 } else { 29 };
        let (mut at, mut noticed) = (0, 0);
        while at < good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(&path, &bytes).unwrap();
            if let Ok(source) = MappedRam::open(&path) {
                let sink = Collect::new(source.layout());
                let feed = source.start(sink.clone()).unwrap();
                for run in source.layout().runs() {
                    feed.request(run, Urgency::Demand);
                }
                drop(feed);
                for (id, ram) in oracle.layout().iter() {
                    for page in (0..ram.pages().0).map(PageIndex) {
                        let run = PageRun::single(id, page);
                        match sink.bytes(run) {
                            Some(bytes) => assert!(bytes == oracle.run(run), "byte {at}, {run}"),
                            None => {
                                let failed = sink.failed();
                                let named = failed.iter().any(|(failed, _)| !failed.intersect(run).is_empty());
                                assert!(named, "byte {at}: {run} was never answered");
                                noticed += 1;
                            }
                        }
                    }
                }
            } else {
                noticed += 1;
            }
            at += step(at);
        }
        assert!(noticed > 0);
    }
}

#[test]
fn a_compressed_source_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let block = |name: &str, pages: u64| RamBlock::new(name, ByteLen(pages * PAGE_SIZE), PageSize::SMALL).unwrap();
    let layout = Layout::new(vec![block("pc.ram", 300), block("rom", 2)]).unwrap();
    let oracle = Arc::new(Oracle::random(11, layout, 120));
    let truth = Arc::clone(&oracle);
    let suite = Suite::new(move |one| Page::Content(truth.run(one).to_vec()));
    for codec in CODECS {
        let path = compressed(&plain(dir.path(), &oracle), codec, ByteLen(4 * PAGE_SIZE));
        let source = MappedRam::open(&path).unwrap();
        suite.source(Arc::new(source.clone())).unwrap();
        suite.source(Arc::new(Threaded::new(source, 2))).unwrap();
    }
}

#[test]
fn a_unit_is_what_one_frame_holds() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Oracle::random(9, Oracle::random_layout(9, 300), 128);
    let path = compressed(&plain(dir.path(), &oracle), CODECS[0], ByteLen(16 * PAGE_SIZE));
    let source = MappedRam::open(&path).unwrap();
    let snapshot = source.snapshot();
    for run in source.layout().runs() {
        for page in run.iter() {
            let unit = source.unit(run.block, page);
            assert!(unit.iter().any(|other| other == page) && source.layout().contains(unit), "{unit}");
            if !oracle.zero_at(run.block, page) {
                let base = snapshot.block(run.block).unwrap().pages_offset;
                let frame = snapshot.frames().unwrap().frame_at(base + page.byte_offset()).unwrap();
                assert!(frame.decoded().start <= base + unit.first.byte_offset());
                assert!(base + unit.end().byte_offset() <= frame.decoded().end.max(FileOffset(0)));
            }
        }
    }
}
