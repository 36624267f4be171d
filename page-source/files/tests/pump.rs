//! Any source into any sink: everything arrives, or the sink is told that it did not.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use page_files::{FlatBlock, FlatFile, FlatSink};
use page_source::{
    Answer, Content, End, Feed, OneShot, PageSink, PageSource, Pages, Progress, PumpError, PumpOptions, Reply,
    SinkError, Source, SourceError, Threaded, Urgency, pump,
};
use page_units::{BlockId, PageCount, PageRun};
use parking_lot::Mutex;
use testkit::collector::Collector;
use testkit::faults::{Fault, FaultySource};
use testkit::gate::Gate;
use testkit::late::{LatePeer, LateSource};
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;

fn oracle(seed: u64) -> Arc<Oracle> {
    Arc::new(Oracle::random(seed, Oracle::random_layout(seed, 3000), 150))
}

fn flat_sink(oracle: &Oracle, path: &Path) -> Arc<FlatSink> {
    let blocks = FlatBlock::concatenated(oracle.layout().blocks().to_vec()).unwrap();
    Arc::new(FlatSink::create(path, &blocks).unwrap())
}

/// The whole of a flat file equals the oracle, zero pages included.
fn assert_flat(path: &Path, oracle: &Oracle) {
    let blocks = oracle.layout().iter().map(|(id, _)| oracle.block(id)).collect::<Vec<_>>().concat();
    assert!(std::fs::read(path).unwrap() == blocks, "{} differs", path.display());
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn every_source_fills_a_flat_file_exactly() {
    let dir = tempfile::tempdir().unwrap();
    for (_, seed) in seeds(12) {
        let oracle = oracle(seed);
        let original = dir.path().join("original");
        let blocks = oracle.write_flat(&original).unwrap();
        let memory = MemorySource::new(Arc::clone(&oracle));
        let late = LateSource::new(Arc::clone(&oracle), seed);
        let flat = FlatFile::open(&original, blocks).unwrap();
        let sources: [&dyn Fn() -> Source; 8] = [
            &|| Arc::new(memory.clone()).into(),
            &|| Arc::new(memory.clone().knowing_nothing()).into(),
            &|| Arc::new(late.clone()).into(),
            &|| Box::new(late.clone().with_threads(3).sending_each_page_once()).into(),
            &|| Arc::new(flat.clone()).into(),
            &|| Arc::new(flat.clone().with_zero_scan(true)).into(),
            &|| Arc::new(Threaded::new(flat.clone(), 2)).into(),
            &|| Arc::new(Threaded::new(late.clone(), 1)).into(),
        ];
        for (i, source) in sources.iter().enumerate() {
            for (threads, find_zeros, piece) in [(1, false, 256), (3, true, 7)] {
                let copy = dir.path().join("copy");
                let sink = flat_sink(&oracle, &copy);
                let piece = PageCount(piece);
                let options = PumpOptions { threads, find_zeros, piece, ..PumpOptions::default() };
                let pumped = pump(source(), Arc::clone(&sink) as Arc<dyn PageSink>, &options)
                    .unwrap_or_else(|error| panic!("source {i}, seed {seed}: {error}"));
                sink.publish().unwrap();
                assert_flat(&copy, &oracle);
                assert_eq!(pumped.stored + pumped.zero, oracle.layout().total().to_pages());
                if find_zeros || i == 0 {
                    assert_eq!(pumped.stored, oracle.stored_pages(), "source {i}, seed {seed}");
                }
            }
        }
    }
    assert_eq!(entries(dir.path()), 2, "no temporary file stays");
}

#[test]
fn holes_stay_holes() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let layout = Oracle::new([("ram", vec![0; 64 << 20])]).unwrap().layout().clone();
    let mut oracle = Oracle::zero(layout);
    oracle.block_mut(BlockId(0))[5 << 20..][..4096].fill(7);
    let oracle = Arc::new(oracle);
    let copy = dir.path().join("copy");
    let sink = flat_sink(&oracle, &copy);
    let source = MemorySource::new(Arc::clone(&oracle));
    pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default()).unwrap();
    assert!(!copy.exists(), "complete, and not published yet");
    sink.publish().unwrap();
    assert_flat(&copy, &oracle);
    let meta = std::fs::metadata(&copy).unwrap();
    assert!(meta.blocks() * 512 < 1 << 20, "{} bytes on the disk", meta.blocks() * 512);
}

#[test]
fn every_fault_breaks_the_file_and_never_hangs() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = oracle(1);
    let inner: [Arc<dyn PageSource>; 3] = [
        Arc::new(LateSource::new(Arc::clone(&oracle), 5)),
        Arc::new(LateSource::new(Arc::clone(&oracle), 6).with_threads(2)),
        Arc::new(Threaded::new(MemorySource::new(Arc::clone(&oracle)).knowing_nothing(), 2)),
    ];
    for inner in inner {
        for at in [0, 1, 7, 20] {
            for fault in [Fault::Error, Fault::Short, Fault::Panic, Fault::Silence, Fault::Broken] {
                let source = FaultySource::new(Arc::clone(&inner), at, fault.clone());
                let path = dir.path().join("copy");
                let sink = flat_sink(&oracle, &path);
                let options = PumpOptions { threads: 2, piece: PageCount(16), ..PumpOptions::default() };
                let error = pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &options).unwrap_err();
                let said = error.to_string();
                match fault {
                    Fault::Error | Fault::Short => {
                        assert!(said.contains("injected: reading") && said.contains("RAM block \""), "{said}");
                    }
                    Fault::Panic => assert!(said.contains("panicked"), "{said}"),
                    Fault::Silence => assert!(said.contains("died"), "{said}"),
                    _ => assert!(said.contains("broken at run"), "{said}"),
                }
                assert!(sink.publish().is_err());
                drop(sink);
                assert_eq!(entries(dir.path()), 0, "nothing is published, nothing stays");
            }
        }
    }
}

/// Sees every request of a pump.
#[derive(Debug)]
struct Watched {
    inner: LatePeer,
    asked: Arc<AtomicU64>,
    asks: Arc<Mutex<Vec<PageCount>>>,
}

#[derive(Debug)]
struct WatchedFeed(Box<dyn Feed>, Arc<AtomicU64>, Arc<Mutex<Vec<PageCount>>>);

impl Feed for WatchedFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        self.1.fetch_add(run.pages.0, Ordering::AcqRel);
        self.2.lock().push(run.pages);
        self.0.request(run, urgency)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        self.0.finish()
    }
}

impl OneShot for Watched {
    fn pages(&self) -> Arc<dyn Pages> {
        self.inner.pages()
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let inner = Box::new(self.inner).start(sink)?;
        Ok(Box::new(WatchedFeed(inner, self.asked, self.asks)))
    }
}

#[test]
fn a_late_source_is_asked_for_no_more_than_the_window() {
    let oracle = Arc::new(Oracle::random(3, Oracle::random_layout(3, 3000), 200));
    let gate = Gate::closed();
    let inner = LateSource::new(Arc::clone(&oracle), 3).with_unasked(false).with_gate(gate.clone());
    // Each page once: what comes twice would be counted as arrived twice here.
    let source = Watched { inner: inner.sending_each_page_once(), asked: Arc::default(), asks: Arc::default() };
    let (asked, asks) = (Arc::clone(&source.asked), Arc::clone(&source.asks));
    let arrived = Arc::new(AtomicU64::new(0));
    let sink = {
        let (asked, arrived) = (Arc::clone(&asked), Arc::clone(&arrived));
        Collector::with_hook(move |run| {
            let before = arrived.fetch_add(run.pages.0, Ordering::AcqRel);
            assert!(asked.load(Ordering::Acquire) <= before + 64, "more than the window is under way");
            Reply::Taken
        })
    };
    let told = Mutex::new(Vec::new());
    let progress = |progress: Progress| told.lock().push(progress);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            gate.wait_for(1);
            assert!(asked.load(Ordering::Acquire) <= 64);
            gate.pass(3);
            gate.wait_for_passed(3);
            gate.open();
        });
        let options = PumpOptions {
            threads: 2,
            piece: PageCount(10),
            window: PageCount(64),
            progress: Some(&progress),
            ..PumpOptions::default()
        };
        pump(Box::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &options).unwrap();
    });
    for (id, _) in oracle.layout().iter() {
        assert!(sink.content(oracle.layout(), id) == oracle.block(id));
    }
    assert!(asks.lock().iter().all(|pages| pages.0 <= 10));
    let told = told.into_inner();
    let total = oracle.layout().total().to_pages();
    assert_eq!(told.last(), Some(&Progress { done: total, total }));
    assert!(told.is_sorted_by_key(|progress| progress.done));
    assert!(matches!(sink.state.lock().ends[..], [End::Complete]));
}

#[test]
fn a_sink_that_breaks_ends_the_pump_with_its_error() {
    let oracle = oracle(4);
    let sources: [Arc<dyn PageSource>; 2] =
        [Arc::new(MemorySource::new(Arc::clone(&oracle))), Arc::new(LateSource::new(Arc::clone(&oracle), 4))];
    for source in sources {
        let left = AtomicU64::new(5);
        let sink = Collector::with_hook(move |_| {
            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                return SinkError::stopped("the disk is full").into();
            }
            Reply::Taken
        });
        let options = PumpOptions { piece: PageCount(5), threads: 2, ..PumpOptions::default() };
        let error = pump(source, Arc::clone(&sink) as Arc<dyn PageSink>, &options).unwrap_err();
        assert!(matches!(&error, PumpError::Sink(SinkError::Stopped { reason }) if reason == "the disk is full"));
        let state = sink.state.lock();
        assert!(matches!(&state.ends[..], [End::Broken(error)] if error.to_string().contains("the disk is full")));
    }
}

#[test]
fn a_file_that_changes_during_the_last_page_is_not_complete() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = oracle(2);
    let original = dir.path().join("original");
    let source = FlatFile::open(&original, oracle.write_flat(&original).unwrap()).unwrap();
    let last = oracle.layout().runs().filter(|run| !run.is_empty()).last().unwrap();
    let touched = original.clone();
    let sink = Collector::with_hook(move |run| {
        if run.block == last.block && run.end() == last.end() {
            std::fs::File::options().write(true).open(&touched).unwrap().set_len(1 << 40).unwrap();
        }
        Reply::Taken
    });
    let error =
        pump(Arc::new(source.clone()), Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default()).unwrap_err();
    assert!(error.to_string().contains("original: its size changed"), "{error}");
    assert!(matches!(sink.state.lock().ends[..], [End::Broken(_)]));
    assert_eq!(source.content(PageRun::single(last.block, last.end())).pages, PageCount(0));
    assert_ne!(source.content(last).content, Content::Unknown);
}

#[test]
fn a_file_truncated_under_the_writer_names_the_original() {
    let dir = tempfile::tempdir().unwrap();
    let oracle = Arc::new(Oracle::random(9, Oracle::random_layout(9, 3000), 255));
    let original = dir.path().join("original");
    let inner = FlatFile::open(&original, oracle.write_flat(&original).unwrap()).unwrap();
    let gate = Gate::closed();
    let source = FaultySource::new(Arc::new(inner), 1, Fault::Slow(gate.clone()));
    let copy = dir.path().join("copy");
    let sink = flat_sink(&oracle, &copy);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            gate.wait_for(1);
            std::fs::File::options().write(true).open(&original).unwrap().set_len(100).unwrap();
            gate.open();
        });
        let options = PumpOptions { piece: PageCount(16), ..PumpOptions::default() };
        let error = pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &options).unwrap_err();
        assert!(error.to_string().contains("original: its size changed"), "{error}");
        assert!(error.to_string().contains("RAM block \""), "{error}");
    });
    assert!(sink.publish().is_err() && !copy.exists());
}
