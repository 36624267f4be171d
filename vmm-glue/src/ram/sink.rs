//! Guest memory that is filled before anything runs: the eager way.

use std::sync::Arc;

use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError};
use page_units::{BlockId, Layout, PageRun};

use crate::ram::{GuestRam, MemoryError};
use crate::sys;

/// Takes pages into fresh guest memory, which is zero where nothing arrives.
#[derive(Debug)]
pub(crate) struct RamSink {
    ram: Arc<GuestRam>,
    /// By block of the source.
    blocks: Vec<Option<BlockId>>,
}

impl RamSink {
    /// Pages come from a source with these blocks, found by name.
    pub(crate) fn new(ram: Arc<GuestRam>, source: &Layout) -> Result<RamSink, MemoryError> {
        // The same check that the engine's regions get.
        ram.regions(source)?;
        let blocks = source.blocks().iter().map(|block| ram.layout().find(block.name()).map(|found| found.0));
        let blocks = blocks.collect();
        Ok(RamSink { ram, blocks })
    }

    fn take(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        let block = usize::try_from(run.block.0).ok().and_then(|block| self.blocks.get(block));
        let Some(block) = block.copied().flatten() else { return Reply::Taken };
        let lent = run;
        let run = PageRun { block, ..run };
        for piece in self.ram.pieces() {
            let part = piece.run.intersect(run);
            if part.is_empty() {
                continue;
            }
            let host = piece.host + (part.first - piece.run.first).to_bytes();
            let bytes = bytes.slice((part.first - run.first).to_bytes(), part.len());
            if sys::write_memory(bytes.as_kernel_ptr(), host, part.len()).is_err() {
                return Reply::Unreadable(PageRun { block: lent.block, ..part });
            }
        }
        Reply::Taken
    }
}

impl PageSink for RamSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.take(run, bytes)
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

    /// The caller of `pump` learns how it ended.
    fn end(&self, _: End) {}
}
