//! Answering from threads of one's own.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};

use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};

use crate::{End, Feed, Flow, PageBytes, PageSink, PageSource, SinkError, SourceError, Span, Urgency};

/// How much of the background one thread does before it looks whether something is in demand.
const PIECE: PageCount = PageCount(64);

/// Any source, whose requests are answered from threads of its own: for storage that may block (NFS, a slow disk, a
/// decompressor), so that [`Feed::request`] does not.
///
/// One thread answers demand and nothing else. So many others as are asked for do both, demand first, and background
/// in pieces of 256 KiB. If a thread panics, all stop, and the sink is told that the flow is broken.
///
/// Dropping the feed waits for what the threads are reading just then, and forgets what they have not begun.
#[derive(Clone, Debug)]
pub struct Threaded<S> {
    source: S,
    background: usize,
}

impl<S: PageSource> Threaded<S> {
    /// `source`, with a demand thread and `background` threads (at least one) for everything.
    #[must_use]
    pub fn new(source: S, background: usize) -> Threaded<S> {
        Threaded { source, background: background.max(1) }
    }

    /// The source that is asked.
    #[must_use]
    pub fn source(&self) -> &S {
        &self.source
    }
}

impl<S: PageSource> PageSource for Threaded<S> {
    fn layout(&self) -> &Layout {
        self.source.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        self.source.run_at(block, first)
    }

    fn run_within(&self, block: BlockId, first: PageIndex, most: PageCount) -> Span {
        self.source.run_within(block, first, most)
    }

    fn repeatable(&self) -> bool {
        self.source.repeatable()
    }

    fn verify(&self) -> Result<(), SourceError> {
        self.source.verify()
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let queue = Arc::new(Queue::new(self.background + 1));
        let last = Arc::new(LastWord { sink, queue: Arc::clone(&queue) });
        let feed: Arc<dyn Feed> = Arc::from(self.source.start(Arc::clone(&last) as Arc<dyn PageSink>)?);
        let mut threaded = ThreadedFeed { queue, inner: Arc::downgrade(&feed), threads: Vec::new() };
        for worker in 0..=self.background {
            let (last, feed) = (Arc::clone(&last), Arc::clone(&feed));
            let both = worker > 0;
            let thread = thread::Builder::new()
                .name(if both { "page-source".to_owned() } else { "page-source-demand".to_owned() })
                .spawn(move || last.work(feed, both));
            match thread {
                Ok(thread) => threaded.threads.push(thread),
                // Those that run are joined by the drop.
                Err(error) => {
                    let reason = format!("no thread can be started: {error}");
                    return Err(SourceError::Stopped { reason });
                }
            }
        }
        Ok(Box::new(threaded))
    }
}

#[derive(Debug)]
struct Queue {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Debug)]
struct State {
    demand: VecDeque<PageRun>,
    background: VecDeque<PageRun>,
    stop: bool,
    /// Why it broke, to be told by the last thread.
    broken: Option<SourceError>,
    /// The end was told.
    ended: bool,
    working: usize,
}

impl Queue {
    fn new(threads: usize) -> Queue {
        let state = State {
            demand: VecDeque::new(),
            background: VecDeque::new(),
            stop: false,
            broken: None,
            ended: false,
            working: threads,
        };
        Queue { state: Mutex::new(state), filled: Condvar::new() }
    }

    /// The next piece of work; `None` when it is over.
    fn next(&self, both: bool) -> Option<(PageRun, Urgency)> {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            if let Some(run) = state.demand.pop_front() {
                return Some((run, Urgency::Demand));
            }
            if both && let Some(run) = state.background.front_mut() {
                let (piece, rest) = run.split_at(PIECE);
                *run = rest;
                if rest.is_empty() {
                    state.background.pop_front();
                }
                return Some((piece, Urgency::Background));
            }
            self.filled.wait(&mut state);
        }
    }

    fn stop(&self, broken: Option<SourceError>) {
        let mut state = self.state.lock();
        state.stop = true;
        if state.broken.is_none() {
            state.broken = broken;
        }
        self.filled.notify_all();
    }
}

/// The sink as the inner source sees it. An end in brokenness is told by the last thread, so that nothing follows it.
#[derive(Debug)]
struct LastWord {
    sink: Arc<dyn PageSink>,
    queue: Arc<Queue>,
}

impl LastWord {
    fn work(&self, feed: Arc<dyn Feed>, both: bool) {
        let mut leaving = Leaving { last: self, feed: Some(feed) };
        while let Some((run, urgency)) = self.queue.next(both) {
            if let Some(feed) = &leaving.feed {
                feed.request(run, urgency);
                if !feed.alive() {
                    break;
                }
            }
        }
        leaving.feed = None;
    }

    fn seen(&self, flow: Flow) -> Flow {
        match &flow {
            ControlFlow::Continue(()) | ControlFlow::Break(SinkError::Unreadable(_)) => {}
            ControlFlow::Break(_) => self.queue.stop(None),
        }
        flow
    }
}

impl PageSink for LastWord {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        self.seen(self.sink.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Flow {
        self.seen(self.sink.zero(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Flow {
        self.seen(self.sink.failed(run, error))
    }

    fn end(&self, end: End) {
        match end {
            End::Broken(error) => self.queue.stop(Some(error)),
            End::Complete => {
                let told = std::mem::replace(&mut self.queue.state.lock().ended, true);
                if !told {
                    self.sink.end(End::Complete);
                }
            }
        }
    }
}

/// A thread, until it has ended, however it does.
#[derive(Debug)]
struct Leaving<'a> {
    last: &'a LastWord,
    feed: Option<Arc<dyn Feed>>,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let reason = "a thread of the source panicked".to_owned();
            self.last.queue.stop(Some(SourceError::Stopped { reason }));
        } else if self.feed.as_ref().is_some_and(|feed| !feed.alive()) {
            self.last.queue.stop(None);
        }
        self.feed = None;
        let mut state = self.last.queue.state.lock();
        state.working -= 1;
        if state.working > 0 || state.ended {
            return;
        }
        if let Some(error) = state.broken.take() {
            state.ended = true;
            drop(state);
            self.last.sink.end(End::Broken(error));
        }
    }
}

/// Joins the threads when it is dropped. The inner feed is dropped by the last of them.
#[derive(Debug)]
struct ThreadedFeed {
    queue: Arc<Queue>,
    inner: Weak<dyn Feed>,
    threads: Vec<JoinHandle<()>>,
}

impl Feed for ThreadedFeed {
    fn request(&self, run: PageRun, urgency: Urgency) {
        if run.is_empty() {
            return;
        }
        let mut state = self.queue.state.lock();
        if state.stop {
            return;
        }
        match urgency {
            Urgency::Demand => state.demand.push_back(run),
            Urgency::Background => match state.background.back_mut() {
                // What follows on each other costs no memory.
                Some(last) if last.block == run.block && last.end() == run.first => last.pages += run.pages,
                _ => state.background.push_back(run),
            },
        }
        // Which of the threads wakes is up to the system, and not each may take what came.
        self.queue.filled.notify_all();
    }

    fn alive(&self) -> bool {
        self.inner.upgrade().is_some_and(|inner| inner.alive())
    }
}

impl Drop for ThreadedFeed {
    fn drop(&mut self) {
        self.queue.stop(None);
        for thread in self.threads.drain(..) {
            // If it panicked, the sink was told.
            drop(thread.join());
        }
    }
}
