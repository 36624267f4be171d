//! Answering from threads of one's own.

mod queue;

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use page_units::{BlockId, Layout, PageIndex, PageRun};

use self::queue::Queue;
use crate::{Answer, End, Feed, OneEnd, PageBytes, PageSink, PageSource, Pages, Reply, SourceError, Span, Urgency};

/// Any source, whose requests are answered from threads of its own: for storage that may block (NFS, a slow disk, a
/// decompressor), so that [`Feed::request`] does not.
///
/// One thread answers demand and nothing else. As many others as are asked for do both, demand first, and background in
/// pieces of 256 KiB. If a thread panics, all stop, and the flow ends as [`End::Broken`].
///
/// Dropping or finishing the feed waits for what the threads are reading just then, and forgets what they have not begun.
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

impl<S: PageSource> Pages for Threaded<S> {
    fn layout(&self) -> &Layout {
        self.source.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        self.source.content(run)
    }

    fn unit(&self, block: BlockId, page: PageIndex) -> PageRun {
        self.source.unit(block, page)
    }
}

impl<S: PageSource> PageSource for Threaded<S> {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let ends = Arc::new(Ends { sink: OneEnd::new(sink), queue: Queue::default() });
        let inner = Arc::new(self.source.start(Arc::clone(&ends) as Arc<dyn PageSink>)?);
        let mut feed = ThreadedFeed { ends, inner: Some(inner), threads: Vec::new() };
        for number in 0..=self.background {
            match feed.spawn(number > 0) {
                Ok(thread) => feed.threads.push(thread),
                Err(error) => {
                    // Not started, so that no end is told. Those threads that run are joined by the drop.
                    feed.ends.sink.never_started();
                    return Err(SourceError::stopped("no thread can be started").with_cause(error));
                }
            }
        }
        Ok(Box::new(feed))
    }
}

/// The sink as the inner source sees it: what ends the flow ends the threads, too.
#[derive(Debug)]
struct Ends {
    sink: OneEnd,
    queue: Queue,
}

impl Ends {
    fn seen(&self, reply: Reply) -> Reply {
        if matches!(reply, Reply::Stop(_)) {
            self.queue.stop();
        }
        reply
    }
}

impl PageSink for Ends {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.seen(self.sink.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.seen(self.sink.zero(run))
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.seen(self.sink.absent(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.seen(self.sink.failed(run, error))
    }

    fn end(&self, end: End) {
        self.queue.stop();
        self.sink.end(end);
    }
}

fn panicked() -> SourceError {
    SourceError::stopped("a thread of the source panicked")
}

/// Tells the sink at once if a thread dies: nobody else would.
struct Worker(Arc<Ends>);

impl Drop for Worker {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(End::Broken(panicked()));
        }
    }
}

/// Joins the threads when it is finished or dropped, and then lets the inner source go.
#[derive(Debug)]
struct ThreadedFeed {
    ends: Arc<Ends>,
    inner: Option<Arc<Box<dyn Feed>>>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadedFeed {
    fn spawn(&self, both: bool) -> io::Result<JoinHandle<()>> {
        let name = if both { "page-source" } else { "page-source-demand" };
        let (worker, inner) = (Worker(Arc::clone(&self.ends)), self.inner.clone());
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let (Some(inner), Some((run, urgency))) = (&inner, worker.0.queue.next(both)) {
                inner.request(run, urgency);
            }
        })
    }

    /// Whether all of them ended well.
    fn join(&mut self) -> bool {
        self.ends.queue.stop();
        // If one panicked, the sink was told.
        let panicked = self.threads.drain(..).filter_map(|thread| thread.join().err()).count();
        panicked == 0
    }
}

impl Feed for ThreadedFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        self.ends.queue.push(run, urgency);
        Answer::Later
    }

    fn finish(mut self: Box<Self>) -> Result<(), SourceError> {
        let well = self.join();
        // The threads are gone, and with them their parts of it.
        let finished = self.inner.take().and_then(Arc::into_inner).map_or(Ok(()), Feed::finish);
        if well { finished } else { Err(panicked()) }
    }
}

impl Drop for ThreadedFeed {
    fn drop(&mut self) {
        self.join();
    }
}
