//! The memory of a stopped guest as a source of pages.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use page_source::{
    Answer, Content, EndGuard, Feed, PageBytes, PageSink, PageSource, Pages, Reply, SourceError, SourceErrorKind, Span,
    Subject, Urgency,
};
use page_units::{Layout, PageCount, PageRun};

use crate::ram::GuestRam;
use crate::sys;

/// How much is copied at a time.
const CHUNK: PageCount = PageCount(256);

/// Guest memory that does not change. Pages that do not exist are zero without being touched, and a page that can't be
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

impl Pages for RamSource {
    fn layout(&self) -> &Layout {
        self.inner.ram.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        let run = self.layout().clip(run);
        let runs = usize::try_from(run.block.0).ok().and_then(|block| self.inner.populated.get(block));
        let runs = runs.map(Vec::as_slice).unwrap_or_default();
        let next = runs.get(runs.partition_point(|there| there.end() <= run.first));
        let (content, pages) = match next {
            Some(there) if there.first <= run.first => (Content::Stored, there.end() - run.first),
            Some(there) => (Content::Zero, there.first - run.first),
            None => (Content::Zero, run.pages),
        };
        Span::new(content, pages.min(run.pages))
    }
}

impl PageSource for RamSource {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(RamFeed { source: self.clone(), end: EndGuard::new(sink) }))
    }
}

#[derive(Debug)]
struct RamFeed {
    source: RamSource,
    end: EndGuard,
}

impl Feed for RamFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        // If the sink takes no more, it knows.
        let _ = self.deliver(run);
        Answer::Here
    }

    /// The guest stands still: what was delivered is what its memory is.
    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

fn unreadable(run: PageRun) -> SourceError {
    let subject = Subject::peer("guest memory").run(run);
    SourceError::new(SourceErrorKind::Unreadable, subject, format!("{run} can't be read"))
}

impl RamFeed {
    fn deliver(&self, run: PageRun) -> ControlFlow<Reply> {
        let sink = self.end.sink();
        let mut buffer = Vec::new();
        let mut rest = run;
        while !rest.is_empty() {
            let span = self.source.content(rest);
            if span.pages.0 == 0 {
                return sink.failed(rest, unreadable(rest)).branch();
            }
            let most = if span.content == Content::Zero { span.pages } else { span.pages.min(CHUNK) };
            let (now, later) = rest.split_at(most);
            rest = later;
            if span.content == Content::Zero {
                sink.zero(now).branch()?;
            } else if self.read(now, &mut buffer) {
                page_source::deliver(sink, now, PageBytes::from_slice(&buffer), unreadable)?;
            } else {
                sink.failed(now, unreadable(now)).branch()?;
            }
        }
        ControlFlow::Continue(())
    }

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
