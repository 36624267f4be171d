//! Flat memory files: content, holes, the end of the file, and changes under our feet.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page_files::{FlatBlock, FlatFile};
use page_source::{Content, End, PageSource, Pages, Reply, SinkError, SourceError, SourceErrorKind, Urgency};
use page_units::{BlockId, FileOffset, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use testkit::collector::{Collector, Got};

const PAGE: usize = 4096;

fn block(name: &str, pages: u64) -> RamBlock {
    RamBlock::new(name, PageCount(pages).to_bytes(), PageSize::SMALL).unwrap()
}

fn run(block: u32, first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(block), PageIndex(first), PageCount(pages))
}

/// Two blocks of 64 and 32 pages; pages 8..16 and 80.. of the file are holes, page 20 is stored and zero.
fn sample(dir: &Path) -> (PathBuf, Vec<u8>) {
    let mut ram: Vec<u8> = (0..96 * PAGE).map(|i| u8::try_from((i / PAGE + i) % 251).unwrap() | 1).collect();
    for hole in [8..16, 80..96, 20..21] {
        ram[hole.start * PAGE..hole.end * PAGE].fill(0);
    }
    let path = dir.join("memory");
    let file = File::create(&path).unwrap();
    file.set_len(ram.len() as u64).unwrap();
    for page in (0..8).chain(16..80) {
        file.write_all_at(&ram[page * PAGE..][..PAGE], (page * PAGE) as u64).unwrap();
    }
    file.sync_all().unwrap();
    (path, ram)
}

fn open(path: &Path) -> FlatFile {
    let blocks = FlatBlock::concatenated(vec![block("low", 64), block("high", 32)]).unwrap();
    FlatFile::open(path, blocks).unwrap()
}

#[test]
fn every_page_arrives_once_and_byte_exact() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ram) = sample(dir.path());
    for (urgency, scan) in [(Urgency::Background, false), (Urgency::Demand, false), (Urgency::Background, true)] {
        let source = open(&path).with_zero_scan(scan);
        let sink = Collector::new();
        let feed = source.start(sink.clone()).unwrap();
        for all in source.layout().runs() {
            for piece in all.pieces(PageCount(if urgency == Urgency::Demand { 1 } else { 24 })) {
                feed.request(piece, urgency);
            }
        }
        feed.finish().unwrap();
        let content = [0, 1].map(|block| sink.content(source.layout(), BlockId(block))).concat();
        assert!(content == ram, "{urgency:?}");
        assert!(matches!(sink.state.lock().ends[..], [End::Stopped]));
        if scan {
            assert_eq!((sink.once(0, 20), sink.once(0, 8), sink.once(1, 31)), (Got::Zero, Got::Zero, Got::Zero));
        }
    }
}

#[test]
fn holes_are_known_once_they_were_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sample(dir.path());
    let source = open(&path);
    let at = |block, page| source.content(run(block, page, 64));
    assert_eq!((at(0, 0).content, at(0, 0).pages), (Content::Unknown, PageCount(64)));
    assert_eq!((at(0, 64).pages, at(9, 0).pages), (PageCount(0), PageCount(0)));
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    feed.request(run(0, 0, 64), Urgency::Background);
    feed.request(run(1, 0, 32), Urgency::Background);
    if at(0, 8).content == Content::Stored {
        return assert_eq!(at(0, 0).pages, PageCount(64), "a file system without holes");
    }
    assert_eq!((at(0, 0).content, at(0, 0).pages), (Content::Stored, PageCount(8)));
    assert_eq!((at(0, 8).content, at(0, 8).pages), (Content::Zero, PageCount(8)));
    assert_eq!((at(0, 20).content, at(0, 20).pages), (Content::Stored, PageCount(44)));
    assert_eq!((at(1, 16).content, at(1, 16).pages), (Content::Zero, PageCount(16)));
    let runs: Vec<_> = sink.state.lock().runs.iter().filter(|(_, kind)| *kind == "zero").map(|(run, _)| *run).collect();
    assert_eq!(runs, [run(0, 8, 8), run(1, 16, 16)]);
    // A demand request now knows, too.
    feed.request(run(0, 9, 1), Urgency::Demand);
    assert_eq!(sink.state.lock().runs.last(), Some(&(run(0, 9, 1), "zero")));
}

#[test]
fn mapped_bytes_reach_the_kernel_but_not_user_code() {
    #[derive(Debug)]
    struct Writes(File);
    impl page_source::PageSink for Writes {
        fn data(&self, run: PageRun, bytes: page_source::PageBytes<'_>) -> Reply {
            assert!(bytes.as_slice().is_none(), "a mapped file is not memory of ours");
            bytes.write_to(&self.0, FileOffset(run.first.byte_offset().0)).unwrap();
            Reply::Taken
        }
        fn zero(&self, _: PageRun) -> Reply {
            Reply::Taken
        }
        fn absent(&self, run: PageRun) -> Reply {
            panic!("{run} is absent")
        }
        fn failed(&self, run: PageRun, error: SourceError) -> Reply {
            panic!("{run}: {error}")
        }
        fn end(&self, _: page_source::End) {}
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, ram) = sample(dir.path());
    let copy = tempfile::tempfile().unwrap();
    copy.set_len(64 * 4096).unwrap();
    let source = open(&path);
    let feed = source.start(std::sync::Arc::new(Writes(copy.try_clone().unwrap()))).unwrap();
    feed.request(run(0, 0, 64), Urgency::Background);
    let mut back = vec![0; 64 * PAGE];
    copy.read_exact_at(&mut back, 0).unwrap();
    assert!(back == ram[..64 * PAGE]);
}

#[test]
fn the_last_page_may_be_partial_and_no_more_than_that() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    let bytes: Vec<u8> = (0..3 * PAGE - 100).map(|i| u8::try_from(i % 255).unwrap() + 1).collect();
    std::fs::write(&path, &bytes).unwrap();
    let blocks = |pages| FlatBlock::concatenated(vec![block("ram", pages)]).unwrap();
    let mut expected = bytes.clone();
    expected.resize(3 * PAGE, 0);
    for urgency in [Urgency::Demand, Urgency::Background] {
        let source = FlatFile::open(&path, blocks(3)).unwrap();
        let sink = Collector::new();
        source.start(sink.clone()).unwrap().request(run(0, 0, 3), urgency);
        assert!(sink.content(source.layout(), BlockId(0)) == expected, "{urgency:?}");
    }
    let error = FlatFile::open(&path, blocks(4)).unwrap_err();
    assert!(error.kind() == SourceErrorKind::Truncated && error.subject().block.as_deref() == Some("ram"), "{error}");
    assert!(error.to_string().contains("memory"), "{error}");
    // Exactly at the end of the page before: nothing of the last page is there.
    std::fs::write(&path, &bytes[..2 * PAGE]).unwrap();
    assert!(FlatFile::open(&path, blocks(3)).is_err());
    assert!(FlatFile::open(&path, blocks(0)).is_ok());
}

#[test]
fn blocks_may_lie_at_odd_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    let bytes: Vec<u8> = (0..5 * PAGE).map(|i| u8::try_from(i % 241).unwrap()).collect();
    std::fs::write(&path, &bytes).unwrap();
    let blocks = vec![FlatBlock { block: block("ram", 3), offset: FileOffset(1234) }];
    let source = FlatFile::open(&path, blocks).unwrap();
    let sink = Collector::new();
    source.start(sink.clone()).unwrap().request(run(0, 0, 3), Urgency::Background);
    assert!(sink.content(source.layout(), BlockId(0)) == bytes[1234..][..3 * PAGE]);
}

#[test]
fn hostile_layouts_and_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let far = vec![FlatBlock { block: block("ram", 1), offset: FileOffset(u64::MAX - 100) }];
    let (path, _) = sample(dir.path());
    let kind = |path: &Path, blocks| FlatFile::open(path, blocks).unwrap_err().kind();
    assert_eq!(kind(&path, far), SourceErrorKind::Corrupt);
    let blocks = FlatBlock::concatenated(vec![block("ram", 1)]).unwrap();
    assert_eq!(kind(dir.path(), blocks.clone()), SourceErrorKind::Unreadable);
    assert_eq!(kind(Path::new("/dev/zero"), blocks.clone()), SourceErrorKind::Unreadable);
    assert_eq!(kind(&dir.path().join("none"), blocks), SourceErrorKind::Unreadable);
}

#[test]
fn pages_outside_the_layout_fail_instead_of_hanging_whoever_waits() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sample(dir.path());
    let source = open(&path);
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    feed.request(run(0, 60, 5), Urgency::Demand);
    feed.request(run(7, 0, 1), Urgency::Background);
    assert_eq!(sink.failures().len(), 6);
    feed.request(run(7, 0, 0), Urgency::Background);
    assert_eq!(sink.state.lock().runs.len(), 2);
}

/// What somebody does to the file, at an exact moment: while the sink holds the pages from 24 on.
fn changed_during_the_load(change: impl Fn(&Path) + Send + Sync + 'static) -> (Vec<String>, SourceError) {
    let dir = tempfile::tempdir().unwrap();
    let (path, ram) = sample(dir.path());
    let source = open(&path);
    let changed = path.clone();
    let sink = Collector::with_hook(move |run| {
        if run.contains(PageIndex(24)) && run.block == BlockId(0) {
            change(&changed);
        }
        Reply::Taken
    });
    let feed = source.start(sink.clone()).unwrap();
    for first in (0..64).step_by(4) {
        feed.request(run(0, first, 4), Urgency::Background);
    }
    for page in 0..32 {
        feed.request(run(1, page, 1), Urgency::Demand);
    }
    // Nothing that was delivered before the change was seen is wrong; everything after it failed.
    for page in 0..64 {
        match sink.once(0, page) {
            Got::Data(bytes) => assert!(page < 28 && bytes == ram[usize::try_from(page).unwrap() * PAGE..][..PAGE]),
            Got::Zero => assert!((8..16).contains(&page)),
            Got::Absent => panic!("page {page} is absent"),
            Got::Failed(why) => {
                assert!(page >= 28, "{why}");
                let offset = format!("{:#x}", page / 4 * 4 * 4096);
                assert!(why.contains("/memory: its ") && why.contains("\"low\"") && why.contains(&offset), "{why}");
            }
        }
    }
    assert_eq!(sink.failures().len(), 36 + 32);
    let error = feed.finish().unwrap_err();
    assert!(matches!(sink.state.lock().ends[..], [End::Broken(_)]));
    assert!(source.start(Collector::new()).is_err(), "a changed file is not loaded from again");
    (sink.failures(), error)
}

#[test]
fn a_truncated_file_fails_what_comes_after() {
    let (failures, error) = changed_during_the_load(|path| {
        File::options().write(true).open(path).unwrap().set_len(40 * 4096).unwrap();
    });
    assert!(failures[0].contains("its size changed"), "{failures:?}");
    assert!(error.to_string().contains("its size changed"), "{error}");
}

#[test]
fn a_file_written_to_fails_what_comes_after() {
    let (failures, _) = changed_during_the_load(|path| {
        File::options().write(true).open(path).unwrap().write_all_at(b"x", 50 * 4096).unwrap();
    });
    assert!(failures[0].contains("its modification time changed"), "{failures:?}");
}

#[test]
fn truncated_and_written_again_in_place_is_seen_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (path, ram) = sample(dir.path());
    let source = open(&path);
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    let other = source.start(Collector::new()).unwrap();
    // Demand only: nobody may have looked by the way.
    feed.request(run(0, 0, 1), Urgency::Demand);
    let mut same = File::options().write(true).truncate(true).open(&path).unwrap();
    same.write_all(&vec![0; ram.len()]).unwrap();
    feed.request(run(0, 1, 1), Urgency::Demand);
    // Nothing tells the reader of the map, but for the clock that says when to look.
    assert!(matches!(sink.once(0, 1), Got::Failed(_)) || sink.once(0, 1) == Got::Data(vec![0; PAGE]));
    // Another flow is finished, and finds it; this one knows then.
    assert!(other.finish().is_err());
    feed.request(run(0, 3, 1), Urgency::Demand);
    assert!(matches!(sink.once(0, 3), Got::Failed(_)));
    assert!(feed.finish().is_err());
}

#[test]
fn bytes_that_are_gone_fail_with_the_name_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sample(dir.path());
    let source = open(&path);
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    feed.request(run(0, 0, 1), Urgency::Demand);
    File::options().write(true).open(&path).unwrap().set_len(0x2000).unwrap();
    feed.request(run(0, 5, 1), Urgency::Demand);
    feed.request(run(1, 1, 2), Urgency::Demand);
    let failures = sink.failures();
    assert_eq!(failures.len(), 3);
    assert!(failures[0].contains("/memory: its size changed") && failures[0].contains("\"low\", file offset 0x5000"));
    assert!(failures[2].contains("\"high\", file offset 0x41000"), "{failures:?}");
}

#[test]
fn demand_alone_notices_a_change_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sample(dir.path());
    let source = open(&path);
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    for page in (0..64).chain(0..64) {
        feed.request(run(0, page, 1), Urgency::Demand);
    }
    feed.request(run(1, 0, 1), Urgency::Demand);
    assert!(matches!(sink.once(1, 0), Got::Failed(_)));
}

#[test]
fn a_sink_that_breaks_gets_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = sample(dir.path());
    let source = open(&path);
    let stop = || SinkError::stopped("enough").into();
    let sink = Collector::with_hook(move |run| if run.contains(PageIndex(8)) { stop() } else { Reply::Taken });
    let feed = source.start(sink.clone()).unwrap();
    feed.request(run(0, 0, 64), Urgency::Background);
    feed.request(run(0, 0, 1), Urgency::Demand);
    assert_eq!(sink.state.lock().runs, [(run(0, 0, 8), "data")]);
    let other = Collector::new();
    source.start(other.clone()).unwrap().request(run(0, 0, 1), Urgency::Demand);
    assert!(matches!(other.once(0, 0), Got::Data(_)));
}
