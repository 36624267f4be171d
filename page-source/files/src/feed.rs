//! Answering requests from a mapped file, on the thread that asks.

use std::fmt::Debug;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use page_units::{BlockId, ByteLen, FileOffset, Layout, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex, PageRun};

use crate::mapped_file::MappedFile;
use crate::readahead::ReadAhead;
use page_source::{
    Content, Feed, Flow, PageBytes, PageSink, SinkError, SourceError, Span, Urgency, deliver_without_zeros,
};

/// How old the latest check for changes may be when a page is served on demand: asking costs a good part of what serving
/// the page costs.
const CHECK_EVERY: Duration = Duration::from_micros(100);
/// The most that is delivered in the background between two such checks, in pages: 8 MiB. Pieces end at multiples of
/// it, so that no huge page is cut.
const PIECE: u64 = 2048;

/// What the pages of a file are, and where.
pub(crate) trait Places: Debug + Send + Sync + 'static {
    fn layout(&self) -> &Layout;

    fn mapped(&self) -> &MappedFile;

    /// Where page 0 of the block would be. The block exists.
    fn base(&self, block: BlockId) -> FileOffset;

    /// What the page and those behind it are; the block has them. At least one page; more than `most` are of no use.
    /// [`Content::Unknown`] is delivered as if it were stored. With [`Urgency::Demand`] it does not wait for a lock,
    /// and does no more I/O than it must.
    fn find(&self, block: BlockId, first: PageIndex, most: PageCount, urgency: Urgency) -> Result<Span, SourceError>;
}

/// The feed of every source that is a local file. It owns no thread: it is done when [`Feed::request`] returns.
#[derive(Debug)]
pub(crate) struct FileFeed<P> {
    places: Arc<P>,
    sink: Arc<dyn PageSink>,
    ahead: ReadAhead,
    started: Instant,
    /// When the file was checked last: nanoseconds after the start.
    checked: AtomicU64,
    stopped: AtomicBool,
    scan_for_zeros: bool,
}

impl<P: Places> FileFeed<P> {
    /// A feed into `sink`, which looks for zero pages in what is stored if told to.
    ///
    /// # Errors
    /// If the file has already changed.
    pub(crate) fn start(
        places: Arc<P>,
        sink: Arc<dyn PageSink>,
        scan_for_zeros: bool,
    ) -> Result<Box<dyn Feed>, SourceError> {
        places.mapped().verify()?;
        Ok(Box::new(FileFeed {
            places,
            sink,
            ahead: ReadAhead::default(),
            started: Instant::now(),
            checked: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            scan_for_zeros,
        }))
    }

    fn name(&self, block: BlockId) -> &str {
        self.places.layout().get(block).map_or("?", |block| block.name())
    }

    /// Where `page` is in the file; saturates where it can't be, which no file has.
    fn offset(&self, block: BlockId, page: PageIndex) -> FileOffset {
        FileOffset(self.places.base(block).0.saturating_add(page.byte_offset().0))
    }

    fn deliver(&self, run: PageRun, urgency: Urgency) -> Flow {
        let mut rest = run;
        while !rest.is_empty() {
            let span = match self.places.find(rest.block, rest.first, rest.pages, urgency) {
                Ok(span) => span,
                Err(error) => return self.sink.failed(rest, error),
            };
            let piece = PageCount(PIECE - rest.first.0 % PIECE);
            let (now, later) = rest.split_at(match span.content {
                Content::Zero => span.pages,
                _ => span.pages.min(piece),
            });
            match span.content {
                Content::Zero => self.sink.zero(now)?,
                _ => self.stored(now, urgency)?,
            }
            rest = later;
            if urgency == Urgency::Background
                && let Err(what) = self.places.mapped().check()
            {
                return self.fail_changed(rest, what);
            }
        }
        ControlFlow::Continue(())
    }

    /// Pages that are in the file, though the last may be there only in part.
    fn stored(&self, run: PageRun, urgency: Urgency) -> Flow {
        let mapped = self.places.mapped();
        let offset = self.offset(run.block, run.first);
        let inside = PageCount(mapped.size().saturating_sub(offset.0) / PAGE_SIZE);
        let (whole, rest) = run.split_at(inside);
        if !whole.is_empty() {
            if urgency == Urgency::Background {
                let pages = self.places.layout().get(run.block).map_or(PageCount(0), |block| block.pages());
                let limit = self.offset(run.block, PageIndex(pages.0));
                self.ahead.announce(mapped, offset, whole.len(), limit);
            }
            let bytes = mapped.bytes(offset, whole.len());
            if self.scan_for_zeros {
                deliver_without_zeros(&*self.sink, whole, bytes, |run, error| {
                    self.sink.failed(run, self.unreadable(run, run.len(), error))
                })?;
            } else {
                self.sink.data(whole, bytes)?;
            }
        }
        if rest.is_empty() {
            return ControlFlow::Continue(());
        }
        let (last, beyond) = rest.split_at(PageCount(1));
        self.partial(last)?;
        if beyond.is_empty() {
            return ControlFlow::Continue(());
        }
        self.sink.failed(beyond, self.truncated(beyond))
    }

    /// The page in whose middle the file ends: the rest of it is zero.
    fn partial(&self, run: PageRun) -> Flow {
        let mapped = self.places.mapped();
        let offset = self.offset(run.block, run.first);
        let there = mapped.size().saturating_sub(offset.0).min(PAGE_SIZE);
        if there == 0 {
            return self.sink.failed(run, self.truncated(run));
        }
        // Read, not mapped: behind the end of the file, a mapping shows what anybody stored there.
        let mut page = [0; 1 << PAGE_SHIFT];
        match mapped.file().read_exact_at(&mut page[..ByteLen(there).get()], offset.0) {
            Ok(()) => self.sink.data(run, PageBytes::from_slice(&page)),
            Err(error) => self.sink.failed(run, self.unreadable(run, ByteLen(there), error)),
        }
    }

    /// Reading the `length` bytes of `run` failed: maybe because the file is no longer what it was.
    fn unreadable(&self, run: PageRun, length: ByteLen, error: io::Error) -> SourceError {
        let mapped = self.places.mapped();
        let offset = self.offset(run.block, run.first);
        match mapped.check() {
            Ok(()) => mapped.read_error(self.name(run.block), offset, length, error),
            Err(what) => mapped.change_error(what, self.name(run.block), offset),
        }
    }

    fn truncated(&self, run: PageRun) -> SourceError {
        let mapped = self.places.mapped();
        SourceError::Truncated {
            path: mapped.path().to_owned(),
            block: self.name(run.block).to_owned(),
            needed: self.offset(run.block, run.end()),
            actual: FileOffset(mapped.size()),
        }
    }

    fn fail_changed(&self, run: PageRun, what: &'static str) -> Flow {
        if run.is_empty() {
            // Every later request fails, and so does `verify`.
            return ControlFlow::Continue(());
        }
        let offset = self.offset(run.block, run.first);
        self.sink.failed(run, self.places.mapped().change_error(what, self.name(run.block), offset))
    }

    /// The sink found that `gone`, a part of the request `run`, is not in the file any more: it fails, and what comes
    /// behind it.
    fn fail_unreadable(&self, run: PageRun, gone: PageRun) -> Flow {
        let first = run.intersect(gone).first.max(run.first);
        let (_, rest) = run.split_at(first - run.first);
        if rest.is_empty() {
            return ControlFlow::Continue(());
        }
        let error = self.unreadable(rest, rest.len(), Errno::EFAULT.into());
        self.sink.failed(rest, error)
    }

    /// Whether the file is known to have changed. Looks itself unless it just has (demand), or always (background).
    fn changed(&self, urgency: Urgency) -> Option<&'static str> {
        let mapped = self.places.mapped();
        let due = match urgency {
            Urgency::Background => true,
            Urgency::Demand => {
                let now = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
                let due = u128::from(now - self.checked.load(Ordering::Relaxed).min(now)) >= CHECK_EVERY.as_nanos();
                if due {
                    self.checked.store(now, Ordering::Relaxed);
                }
                due
            }
        };
        if due { mapped.check().err() } else { mapped.known_change() }
    }
}

impl<P: Places> Feed for FileFeed<P> {
    fn alive(&self) -> bool {
        !self.stopped.load(Ordering::Relaxed)
    }

    fn request(&self, run: PageRun, urgency: Urgency) {
        if run.is_empty() || self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let flow = if !self.places.layout().contains(run) {
            let reason = format!("{run} was asked for, which the source does not have");
            self.sink.failed(run, SourceError::Stopped { reason })
        } else if let Some(what) = self.changed(urgency) {
            self.fail_changed(run, what)
        } else {
            self.deliver(run, urgency)
        };
        let flow = match flow {
            ControlFlow::Break(SinkError::Unreadable(gone)) => self.fail_unreadable(run, gone),
            flow => flow,
        };
        if let ControlFlow::Break(error) = flow {
            log::debug!("the sink takes no more pages: {error}");
            self.stopped.store(true, Ordering::Relaxed);
        }
    }
}
