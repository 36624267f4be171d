//! 1 GiB of memory that appears as it is touched, from a file that is never read as a whole.
//!
//! ```sh
//! cargo run --release -p uffd-engine --example lazy_memory
//! ```

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use page_files::{FlatBlock, FlatFile};
use page_units::{BlockId, ByteLen, FileOffset, Layout, PAGE_SIZE, PageCount};
use uffd_engine::{Background, Engine, Event, Handlers, Mapping, Region};

const LEN: ByteLen = ByteLen(1 << 30);

/// A sparse file: every 64th page has content, the rest are holes.
fn make_file(path: &Path) -> std::io::Result<()> {
    let file = std::fs::File::create(path)?;
    file.set_len(LEN.0)?;
    for page in (0..LEN.to_pages().0).step_by(64) {
        file.write_all_at(format!("this is page {page}").as_bytes(), page * PAGE_SIZE)?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("memory");
    make_file(&path)?;

    // Where the pages come from: a flat file that holds one RAM block.
    let layout = Layout::single("ram", LEN)?;
    let source = FlatFile::open(&path, vec![FlatBlock { block: layout.blocks()[0].clone(), offset: FileOffset(0) }])?;

    // Where they go: ordinary anonymous memory, of which nothing is there yet.
    let memory = Arc::new(Mapping::anonymous(LEN)?);
    let run = layout.run_of(BlockId(0)).ok_or("no block")?;
    let region = Region::of(&memory, run);

    let begin = Instant::now();
    let engine = Engine::builder()
        .region(region)
        .source(Arc::new(source))
        .handlers(Handlers::threads(1))
        .background(Background::default().paused())
        .observer(|event| {
            if let Event::Complete { after } = event {
                println!("complete after {after:?}");
            }
        })
        .start()?;
    println!("{} MiB usable after {:?}", LEN.0 >> 20, begin.elapsed());

    // Touch a page in the middle: it comes at once, although nothing else is there.
    let page = PageCount(LEN.to_pages().0 / 2);
    let mut text = [0; 24];
    let touch = Instant::now();
    memory.read(page.to_bytes(), &mut text);
    println!("{:?} after {:?}", String::from_utf8_lossy(&text).trim_end_matches('\0'), touch.elapsed());

    // The rest comes in the background.
    engine.resume_background();
    let done = engine.wait()?;
    let stats = done.stats;
    println!(
        "{} pages on demand, {} in the background, {} zero pages never touched",
        stats.demand_pages, stats.background_pages, stats.zero_pages_skipped
    );
    println!("a fault took {:?} (median) from being read to the wake", stats.latency.p50);
    Ok(())
}
