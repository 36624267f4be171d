//! Reading every page that is in a file, and comparing what is there with the bitmaps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mapped_ram::{Options, Snapshot};
use page_files::{FlatBlock, FlatFile, MappedRam};
use page_source::{End, PageBytes, PageSink, PageSource, Reply, SinkError, SourceError};
use page_units::{BlockId, PageCount, PageRun};
use serde::Serialize;

use super::Findings;
use crate::rewrite::pump_with_bar;

/// Numbers of pages.
#[derive(Debug, Serialize)]
pub(super) struct Pages {
    /// Marked as stored.
    pub(super) stored: u64,
    /// Not marked as stored: zero.
    pub(super) zero: u64,
    /// Marked as stored, though nothing but zeros.
    pub(super) stored_but_zero: u64,
    /// Not marked as stored, though not zero in the file.
    pub(super) stale: u64,
}

/// Reads the page areas of a file whose bitmaps can be used.
pub(super) fn check(snapshot: &Snapshot, findings: &mut Findings, json: bool) {
    let in_file: Vec<(BlockId, FlatBlock)> = snapshot
        .layout()
        .iter()
        .filter_map(|(id, block)| {
            let place = snapshot.block(id).filter(|place| place.in_file)?;
            Some((id, FlatBlock { block: block.clone(), offset: place.pages_offset }))
        })
        .collect();
    for (_, block) in snapshot.layout().iter().filter(|(id, _)| !in_file.iter().any(|(other, _)| other == id)) {
        findings.notes.push(format!("the content of RAM block \"{}\" is elsewhere (x-ignore-shared)", block.name()));
    }
    let ids: Vec<BlockId> = in_file.iter().map(|(id, _)| *id).collect();
    if snapshot.lacks_bitmaps() || ids.iter().any(|id| snapshot.stored_pages(*id).is_err()) {
        // That is a problem, and was said.
        return;
    }
    match read(snapshot, ids, in_file.into_iter().map(|(_, block)| block).collect(), json) {
        Ok(pages) => findings.pages = Some(pages),
        Err(problem) => {
            // A truncated file, which was said as well, has pages that can't be read.
            if findings.problems.is_empty() {
                findings.problems.push(problem);
            }
        }
    }
}

fn read(snapshot: &Snapshot, ids: Vec<BlockId>, blocks: Vec<FlatBlock>, json: bool) -> Result<Pages, String> {
    // The sink outlives this borrow; a second look at the same file does not cost much.
    let options = Options::default().with_base(snapshot.base()).with_damaged(true);
    let again = Snapshot::open_with(snapshot.path(), &options).map_err(|error| error.to_string())?;
    if again.identity() != snapshot.identity() {
        return Err("the file was replaced while it was checked".to_owned());
    }
    let total: u64 = blocks.iter().map(|block| block.block.pages().0).sum();
    let stored = ids.iter().map(|id| snapshot.stored_pages(*id).unwrap_or_default().0).sum();
    // Of a plain file all bytes are looked at, also those that no bit marks; of a compressed one each frame is checked.
    let source: Arc<dyn PageSource> = match snapshot.plain_file() {
        Some(file) => {
            let file = file.try_clone().map_err(|error| error.to_string())?;
            Arc::new(FlatFile::from_file(file, snapshot.path(), blocks).map_err(|error| error.to_string())?)
        }
        None if ids.len() < snapshot.layout().blocks().len() => {
            return Err("blocks whose content is not in the file can't be checked in a compressed snapshot".to_owned());
        }
        None => Arc::new(MappedRam::open(snapshot.path()).map_err(|error| error.to_string())?),
    };
    let sink = Arc::new(Judge { snapshot: again, ids, stored_but_zero: AtomicU64::new(0), stale: AtomicU64::new(0) });
    pump_with_bar(source, Arc::clone(&sink) as Arc<dyn PageSink>, json).map_err(|error| error.to_string())?;
    Ok(Pages {
        stored,
        zero: total - stored,
        stored_but_zero: sink.stored_but_zero.load(Ordering::Relaxed),
        stale: sink.stale.load(Ordering::Relaxed),
    })
}

/// Compares what is in the file with the bitmaps.
#[derive(Debug)]
struct Judge {
    snapshot: Snapshot,
    /// The snapshot's numbers of the blocks.
    ids: Vec<BlockId>,
    stored_but_zero: AtomicU64,
    stale: AtomicU64,
}

impl Judge {
    /// How many of the pages are stored, or are not.
    fn count(&self, run: PageRun, wanted: bool) -> Result<u64, SinkError> {
        let block = self.ids.get(run.block.0 as usize).copied().unwrap_or(run.block);
        let mut count = 0;
        let mut rest = run;
        while !rest.is_empty() {
            let found = self.snapshot.load_run(block, rest.first, rest.pages).map_err(SinkError::stopped)?;
            let (now, later) = rest.split_at(found.pages().max(PageCount(1)));
            if found.is_stored() == wanted {
                count += now.pages.0;
            }
            rest = later;
        }
        Ok(count)
    }

    fn add(&self, to: &AtomicU64, counted: Result<u64, SinkError>) -> Reply {
        match counted {
            Ok(count) => {
                to.fetch_add(count, Ordering::Relaxed);
                Reply::Taken
            }
            Err(error) => error.into(),
        }
    }
}

impl PageSink for Judge {
    fn data(&self, run: PageRun, _: PageBytes<'_>) -> Reply {
        self.add(&self.stale, self.count(run, false))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.add(&self.stored_but_zero, self.count(run, true))
    }

    fn absent(&self, run: PageRun) -> Reply {
        SinkError::Absent(run).into()
    }

    fn failed(&self, _: PageRun, error: SourceError) -> Reply {
        SinkError::Source { error }.into()
    }

    fn end(&self, _: End) {}
}
