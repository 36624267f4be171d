//! The memory of a stopped guest as a source of pages.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use page_source::{Content, Feed, PageBytes, PageSink, PageSource, SourceError, Span, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};

use crate::ram::GuestRam;
use crate::sys;

/// So much is copied at a time.
const CHUNK: PageCount = PageCount(256);

/// Guest memory that nobody writes to. Pages that do not exist are zero without being touched, and a page that can't be
/// read (its content could not be loaded) is a failure, not a signal.
#[derive(Clone)]
pub struct RamSource {
    inner: Arc<Inner>,
}

struct Inner {
    ram: Arc<GuestRam>,
    /// What exists, by block, in order.
    populated: Vec<Vec<PageRun>>,
}

impl fmt::Debug for RamSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamSource").field("layout", self.inner.ram.layout()).finish_non_exhaustive()
    }
}

impl RamSource {
    /// Looks up which pages exist. The guest must be stopped from now on until the source is dropped, and its memory
    /// must be complete: a missing page would be taken for zero.
    ///
    /// # Errors
    /// If the system does not say, or a file behind the memory is shorter than the memory.
    pub fn new(ram: Arc<GuestRam>) -> std::io::Result<RamSource> {
        if let Some(guest) = ram.cut_off()? {
            let reason = format!("the file behind guest memory is cut off at {guest}, and what was there is gone");
            return Err(std::io::Error::other(reason));
        }
        let mut populated = vec![Vec::new(); ram.layout().blocks().len()];
        for run in ram.populated()? {
            if let Some(block) = usize::try_from(run.block.0).ok().and_then(|block| populated.get_mut(block)) {
                block.push(run);
            }
        }
        populated.iter_mut().for_each(|runs: &mut Vec<PageRun>| runs.sort_unstable_by_key(|run| run.first));
        Ok(RamSource { inner: Arc::new(Inner { ram, populated }) })
    }

    /// How many pages exist.
    #[must_use]
    pub fn populated(&self) -> PageCount {
        PageCount(self.inner.populated.iter().flatten().map(|run| run.pages.0).sum())
    }
}

impl PageSource for RamSource {
    fn layout(&self) -> &Layout {
        self.inner.ram.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        let pages = self.layout().get(block).map_or(PageCount(0), |block| block.pages());
        if first.0 >= pages.0 {
            return Span { content: Content::Zero, pages: PageCount(0) };
        }
        let runs = usize::try_from(block.0).ok().and_then(|block| self.inner.populated.get(block));
        let runs = runs.map(Vec::as_slice).unwrap_or_default();
        let next = runs.get(runs.partition_point(|run| run.end() <= first));
        match next {
            Some(run) if run.first <= first => Span { content: Content::Stored, pages: run.end() - first },
            Some(run) => Span { content: Content::Zero, pages: run.first - first },
            None => Span { content: Content::Zero, pages: PageCount(pages.0 - first.0) },
        }
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(RamFeed { source: self.clone(), sink }))
    }
}

#[derive(Debug)]
struct RamFeed {
    source: RamSource,
    sink: Arc<dyn PageSink>,
}

impl Feed for RamFeed {
    fn request(&self, run: PageRun, _: Urgency) {
        let mut buffer = Vec::new();
        let mut rest = run;
        while !rest.is_empty() {
            let span = self.source.run_at(rest.block, rest.first);
            let (now, later) = match span.content {
                Content::Zero => rest.split_at(PageCount(span.pages.0.max(1))),
                Content::Stored | Content::Unknown => rest.split_at(span.pages.min(CHUNK)),
            };
            rest = later;
            let flow = match span.content {
                Content::Zero if span.pages.0 > 0 => self.sink.zero(now),
                Content::Stored | Content::Unknown if self.read(now, &mut buffer) => {
                    self.sink.data(now, PageBytes::from_slice(&buffer))
                }
                _ => self.sink.failed(now, unreadable(now)),
            };
            if let ControlFlow::Break(_) = flow {
                return;
            }
        }
    }
}

fn unreadable(run: PageRun) -> SourceError {
    SourceError::Peer { peer: "guest memory".into(), reason: format!("{run} can't be read") }
}

impl RamFeed {
    /// Lets the kernel copy the pages, which may lie in several pieces.
    fn read(&self, run: PageRun, buffer: &mut Vec<u8>) -> bool {
        buffer.resize(run.len().get(), 0);
        let pieces = self.source.inner.ram.pieces();
        let mut read = 0;
        for piece in pieces {
            let part = piece.run.intersect(run);
            if part.is_empty() {
                continue;
            }
            let host = piece.host + (part.first - piece.run.first).to_bytes();
            let at = (part.first - run.first).to_bytes().get();
            let Some(to) = buffer.get_mut(at..at + part.len().get()) else { return false };
            if sys::read_memory(host, to).is_err() {
                return false;
            }
            read += part.pages.0;
        }
        read == run.pages.0
    }
}
