//! Sources that go wrong at an exact moment.

use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use page_source::{End, Feed, Flow, PageBytes, PageSink, PageSource, SinkError, SourceError, Span, Urgency};
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
    /// The source is silent from now on, without a word. [`Feed::alive`] says so.
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

impl PageSource for FaultySource {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        self.inner.run_at(block, first)
    }

    fn repeatable(&self) -> bool {
        self.inner.repeatable()
    }

    fn verify(&self) -> Result<(), SourceError> {
        self.inner.verify()
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let sink = Arc::new(FaultySink {
            source: self.clone(),
            sink,
            ended: RwLock::new(false),
            silent: AtomicBool::new(false),
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
    silent: AtomicBool,
    dropped: AtomicBool,
}

impl FaultySink {
    fn deliver(&self, run: PageRun, inner: impl Fn(PageRun) -> Flow) -> Flow {
        let stop = |reason: &str| ControlFlow::Break(SinkError::Stopped { reason: reason.to_owned() });
        if self.silent.load(Ordering::Acquire) {
            return stop("silent");
        }
        let number = self.source.delivered.fetch_add(1, Ordering::AcqRel);
        let due = number == self.source.at;
        match &self.source.fault {
            Fault::Slow(gate) if number >= self.source.at && !gate.enter_unless(&self.dropped) => {
                return stop("dropped at the gate");
            }
            Fault::Panic if due => panic!("injected panic at run {number}"),
            Fault::Silence if due => {
                self.silent.store(true, Ordering::Release);
                return stop("silent");
            }
            Fault::Broken if due => {
                self.end(End::Broken(SourceError::Injected(format!("broken at run {number}"))));
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
                if !there.is_empty() {
                    inner(there)?;
                }
                self.sink.failed(gone, self.error(gone))
            }
            _ => inner(run),
        }
    }

    fn error(&self, run: PageRun) -> SourceError {
        SourceError::Read {
            path: PathBuf::from("injected"),
            block: self.source.layout().get(run.block).map_or("?", |block| block.name()).to_owned(),
            offset: FileOffset(run.first.byte_offset().0),
            length: run.len(),
            error: Arc::new(io::Error::other("injected")),
        }
    }
}

impl PageSink for FaultySink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        self.deliver(run, |part| self.sink.data(part, bytes.slice(ByteLen(0), part.len())))
    }

    fn zero(&self, run: PageRun) -> Flow {
        self.deliver(run, |part| self.sink.zero(part))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Flow {
        self.deliver(run, |part| self.sink.failed(part, error.clone()))
    }

    fn end(&self, end: End) {
        let mut ended = self.ended.write();
        if !*ended && !self.silent.load(Ordering::Acquire) {
            self.sink.end(end);
        }
        *ended = true;
    }
}

#[derive(Debug)]
struct FaultyFeed {
    /// There until it is dropped.
    feed: Option<Box<dyn Feed>>,
    sink: Arc<FaultySink>,
}

impl Feed for FaultyFeed {
    fn request(&self, run: PageRun, urgency: Urgency) {
        if let Some(feed) = &self.feed {
            feed.request(run, urgency);
        }
    }

    fn alive(&self) -> bool {
        !self.sink.silent.load(Ordering::Acquire) && self.feed.as_ref().is_some_and(|feed| feed.alive())
    }
}

impl Drop for FaultyFeed {
    fn drop(&mut self) {
        self.sink.dropped.store(true, Ordering::Release);
        if let Fault::Slow(gate) = &self.sink.source.fault {
            gate.wake();
        }
        self.feed = None;
    }
}
