//! Sources that go wrong at an exact moment.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use page_source::{
    Answer, End, Feed, PageBytes, PageSink, PageSource, Pages, Reply, SinkError, SourceError, SourceErrorKind, Span,
    Subject, Urgency,
};
use page_units::{BlockId, ByteLen, FileOffset, Layout, PageCount, PageIndex, PageRun};
use parking_lot::RwLock;

use crate::gate::Gate;

/// What goes wrong.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The run fails, as if reading it had.
    Error,
    /// Of the run (if it has more than one page), the first half comes; the other half fails.
    Short,
    /// The thread that delivers it, and every one after it, comes to a gate first.
    Slow(Gate),
    /// The thread that delivers it panics.
    Panic,
    /// The thread that delivers it dies without a word: all that tells of it is the end of the flow.
    Silence,
    /// The source ends as broken.
    Broken,
}

/// Another source, until the run of that number (from 0) that it delivers; then a [`Fault`].
#[derive(Clone, Debug)]
pub struct FaultySource {
    inner: Arc<dyn PageSource>,
    at: u64,
    fault: Fault,
    delivered: Arc<AtomicU64>,
}

impl FaultySource {
    /// `inner`, of which the run number `at` goes wrong.
    #[must_use]
    pub fn new(inner: Arc<dyn PageSource>, at: u64, fault: Fault) -> FaultySource {
        FaultySource { inner, at, fault, delivered: Arc::default() }
    }

    /// How many runs have been delivered (or gone wrong), over all feeds.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Acquire)
    }
}

impl Pages for FaultySource {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        self.inner.content(run)
    }

    fn unit(&self, block: BlockId, page: PageIndex) -> PageRun {
        self.inner.unit(block, page)
    }
}

impl PageSource for FaultySource {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let sink = Arc::new(FaultySink {
            source: self.clone(),
            sink,
            ended: RwLock::new(false),
            dropped: AtomicBool::new(false),
        });
        let feed = Some(self.inner.start(Arc::clone(&sink) as Arc<dyn PageSink>)?);
        Ok(Box::new(FaultyFeed { feed, sink }))
    }
}

#[derive(Debug)]
struct FaultySink {
    source: FaultySource,
    sink: Arc<dyn PageSink>,
    /// Held for reading during every call, so that the end comes after all of them.
    ended: RwLock<bool>,
    dropped: AtomicBool,
}

impl FaultySink {
    fn deliver(&self, run: PageRun, inner: impl Fn(PageRun) -> Reply) -> Reply {
        let stop = |reason: &str| Reply::Stop(SinkError::stopped(reason));
        let number = self.source.delivered.fetch_add(1, Ordering::AcqRel);
        let due = number == self.source.at;
        match &self.source.fault {
            Fault::Slow(gate) if number >= self.source.at && !gate.enter_unless(&self.dropped) => {
                return stop("dropped at the gate");
            }
            Fault::Panic if due => panic!("injected panic at run {number}"),
            Fault::Silence if due => {
                let what = "its thread has died";
                self.end(End::Broken(SourceError::new(SourceErrorKind::PeerGone, Subject::peer("injected"), what)));
                return stop("silent");
            }
            Fault::Broken if due => {
                self.end(End::Broken(injected(&format!("broken at run {number}"))));
                return stop("broken");
            }
            _ => {}
        }
        let ended = self.ended.read();
        if *ended {
            return stop("ended");
        }
        match &self.source.fault {
            Fault::Error if due => self.sink.failed(run, self.error(run)),
            Fault::Short if due => {
                let (there, gone) = run.split_at(PageCount(run.pages.0 / 2));
                if !there.is_empty()
                    && let reply @ (Reply::Stop(_) | Reply::Unreadable(_)) = inner(there)
                {
                    return reply;
                }
                self.sink.failed(gone, self.error(gone))
            }
            _ => inner(run),
        }
    }

    fn error(&self, run: PageRun) -> SourceError {
        let block = self.source.layout().get(run.block).map_or("?", |block| block.name());
        let offset = FileOffset(run.first.byte_offset().0);
        let length = run.len();
        let what = format!("reading {length} bytes of RAM block \"{block}\" at file offset {offset} failed");
        let subject = Subject::file("injected").block(block).run(run).at(offset);
        SourceError::new(SourceErrorKind::Unreadable, subject, what).with_cause(io::Error::other("injected"))
    }
}

/// A source that says at the end of a flow that what it has delivered is not true any more.
#[derive(Clone, Debug)]
pub struct Altered<S>(S);

impl<S: PageSource> Altered<S> {
    /// `source`, otherwise as it is.
    pub fn new(source: S) -> Altered<S> {
        Altered(source)
    }
}

impl<S: PageSource> Pages for Altered<S> {
    fn layout(&self) -> &Layout {
        self.0.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        self.0.content(run)
    }
}

impl<S: PageSource> PageSource for Altered<S> {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(AlteredFeed(self.0.start(sink)?)))
    }
}

#[derive(Debug)]
struct AlteredFeed(Box<dyn Feed>);

impl Feed for AlteredFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        self.0.request(run, urgency)
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        self.0.finish()?;
        Err(SourceError::new(SourceErrorKind::Changed, Subject::none(), "injected failure: altered"))
    }
}

/// The error of an injected failure.
#[must_use]
pub fn injected(why: &str) -> SourceError {
    SourceError::new(SourceErrorKind::PeerGone, Subject::none(), format!("injected failure: {why}"))
}

impl PageSink for FaultySink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.deliver(run, |part| self.sink.data(part, bytes.slice(ByteLen(0), part.len())))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.deliver(run, |part| self.sink.zero(part))
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.deliver(run, |part| self.sink.absent(part))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.deliver(run, |part| self.sink.failed(part, error.clone()))
    }

    fn end(&self, end: End) {
        let mut ended = self.ended.write();
        if !std::mem::replace(&mut *ended, true) {
            self.sink.end(end);
        }
    }
}

#[derive(Debug)]
struct FaultyFeed {
    /// There until it is dropped.
    feed: Option<Box<dyn Feed>>,
    sink: Arc<FaultySink>,
}

impl Feed for FaultyFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        self.feed.as_ref().map_or(Answer::Here, |feed| feed.request(run, urgency))
    }

    fn finish(mut self: Box<Self>) -> Result<(), SourceError> {
        self.leave();
        self.feed.take().map_or(Ok(()), Feed::finish)
    }
}

impl FaultyFeed {
    fn leave(&self) {
        self.sink.dropped.store(true, Ordering::Release);
        if let Fault::Slow(gate) = &self.sink.source.fault {
            gate.wake();
        }
    }
}

impl Drop for FaultyFeed {
    fn drop(&mut self) {
        self.leave();
        self.feed = None;
    }
}
