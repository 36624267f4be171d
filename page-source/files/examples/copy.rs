//! Copies guest memory from one file into another, whatever their formats: one source, one sink, one pump.
//!
//! ```text
//! cargo run -p page-source --example copy                           makes a snapshot, copies it, compares
//! cargo run -p page-source --example copy -- vm.snap vm.memory      a mapped-ram file into a flat one
//! ```

#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mapped_ram::Writer;
use page_files::{FlatBlock, FlatFile, FlatSink, MappedRam, MappedRamSink};
use page_source::{
    End, PageBytes, PageSink, PageSource, Pages, PumpOptions, Reply, SinkError, SourceError, Urgency, pump,
};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use vmstate::{Configuration, DeviceWriter};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if let [from, to] = arguments.as_slice() {
        return to_flat(from, to).map(drop);
    }
    let dir = tempfile::tempdir()?;
    let (snapshot, memory) = (dir.path().join("vm.snap"), dir.path().join("vm.memory"));
    make_snapshot(&snapshot)?;
    let blocks = to_flat(&snapshot, &memory)?;

    // A source can also be asked for single pages, as a handler of page faults does.
    let sums = [Arc::new(Sum::default()), Arc::new(Sum::default())];
    let sources: [Box<dyn PageSource>; 2] =
        [Box::new(MappedRam::open(&snapshot)?), Box::new(FlatFile::open(&memory, blocks)?)];
    for (source, sum) in sources.iter().zip(&sums) {
        let feed = source.start(Arc::clone(sum) as Arc<dyn PageSink>)?;
        feed.request(PageRun::single(BlockId(0), PageIndex(17)), Urgency::Demand);
        for run in source.layout().runs() {
            feed.request(run, Urgency::Background);
        }
        feed.finish()?;
    }
    let [one, other] = sums.map(|sum| sum.0.load(Ordering::Relaxed));
    println!("checksums: {one:016x} and {other:016x}");
    if one == other { Ok(()) } else { Err("the copy differs".into()) }
}

/// A mapped-ram file into a flat one. Gives the places of the blocks.
fn to_flat(from: &Path, to: &Path) -> Result<Vec<FlatBlock>, Box<dyn Error>> {
    let source = MappedRam::open(from)?;
    let blocks = FlatBlock::concatenated(source.layout().blocks().to_vec())?;
    let sink = Arc::new(FlatSink::create(to, &blocks)?);
    let pumped = pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default())?;
    sink.publish()?;
    println!("{}: {} pages stored, {} zero", to.display(), pumped.stored, pumped.zero);
    Ok(blocks)
}

/// A guest of 64 MiB, of which every fifth page was used.
fn make_snapshot(path: &Path) -> Result<(), Box<dyn Error>> {
    let ram = RamBlock::new("pc.ram", ByteLen(64 << 20), PageSize::SMALL)?;
    let writer = Writer::create(path, &Configuration::new("example"), Layout::new(vec![ram])?)?;
    let sink = MappedRamSink::new(writer);
    for page in (0..PageCount(16384).0).step_by(5) {
        let content = [page.to_le_bytes(); 512].concat();
        let run = PageRun::single(BlockId(0), PageIndex(page));
        if let Reply::Stop(error) = sink.data(run, PageBytes::from_slice(&content)) {
            return Err(error.into());
        }
    }
    sink.end(End::Complete);
    Ok(sink.publish(&DeviceWriter::new(2).finish("example")?)?)
}

/// A sink that is neither memory nor a file: it adds up what it gets.
#[derive(Debug, Default)]
struct Sum(AtomicU64);

impl PageSink for Sum {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        // Bytes of a mapped file are never read directly: the file could be truncated just now.
        let mut content = vec![0; bytes.len().get()];
        if bytes.copy_to(&mut content).is_err() {
            return Reply::Unreadable(run);
        }
        for (page, content) in run.iter().zip(content.chunks(4096)) {
            // A zero page adds nothing, whether it comes as data or as zero.
            let sum = content.iter().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add((*byte).into()));
            self.0.fetch_add(sum.wrapping_mul(page.0 + 1), Ordering::Relaxed);
        }
        Reply::Taken
    }

    fn zero(&self, _: PageRun) -> Reply {
        Reply::Taken
    }

    fn absent(&self, run: PageRun) -> Reply {
        SinkError::Absent(run).into()
    }

    fn failed(&self, _: PageRun, error: SourceError) -> Reply {
        SinkError::Source { error }.into()
    }

    fn end(&self, _: End) {}
}
