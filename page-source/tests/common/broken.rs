//! Sources and sinks with one flaw each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use page_source::{
    Answer, Content, End, Feed, OneShot, PageBytes, PageSet, PageSink, PageSource, Pages, Reply, SinkError,
    SourceError, Span, Urgency,
};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
use parking_lot::Mutex;
use testkit::faults::injected;
use testkit::oracle::Oracle;

/// What is wrong with a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    TwoEnds,
    NoEnd,
    AfterEnd,
    AfterDrop,
    BeyondTheLayout,
    WrongLength,
    EmptyRun,
    HereWithoutAnswer,
    NoAnswer,
    OtherBytes,
    SaysZero,
    FinishHangs,
    DropHangs,
    IgnoresStop,
    IgnoresUnreadable,
    LongSpan,
    EmptySpan,
    OtherUnit,
    StartsOnce,
    AnswersHere,
    Twice,
    CompleteTooEarly,
    DiesSilently,
}

/// Pages of an oracle, with a flaw.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    oracle: Arc<Oracle>,
    flaw: Flaw,
    started: Arc<AtomicBool>,
}

impl Broken {
    pub(crate) fn new(oracle: &Arc<Oracle>, flaw: Flaw) -> Broken {
        Broken { oracle: Arc::clone(oracle), flaw, started: Arc::default() }
    }

    fn deliver(&self, sink: &dyn PageSink, run: PageRun) {
        let small = |(run, zero): (PageRun, bool)| run.pieces(PageCount(3)).map(move |piece| (piece, zero));
        for (piece, zero) in self.oracle.kinds(run).flat_map(small) {
            let reply = match self.flaw {
                Flaw::BeyondTheLayout => sink.zero(PageRun::single(piece.block, PageIndex(1 << 40))),
                Flaw::EmptyRun => sink.zero(piece.split_at(PageCount(0)).0),
                Flaw::WrongLength => sink.data(piece, PageBytes::from_slice(&[1; 12])),
                Flaw::OtherBytes if !zero => sink.data(piece, PageBytes::from_slice(&vec![0xee; piece.len().get()])),
                _ if zero => sink.zero(piece),
                Flaw::SaysZero => sink.zero(piece),
                _ => sink.data(piece, PageBytes::from_slice(self.oracle.run(piece))),
            };
            match reply {
                Reply::Taken => {}
                Reply::Unreadable(gone) if self.flaw != Flaw::IgnoresUnreadable => {
                    let (_, rest) = piece.split_at(gone.first - piece.first);
                    let _ = sink.failed(rest, injected("unreadable"));
                }
                Reply::Unreadable(_) => {}
                Reply::Stop(_) if self.flaw == Flaw::IgnoresStop => {}
                Reply::Stop(_) => return,
            }
        }
    }
}

impl Pages for Broken {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        let inside = self.layout().clip(run);
        match self.flaw {
            Flaw::LongSpan if !inside.is_empty() => Span::new(Content::Unknown, inside.pages + PageCount(1)),
            Flaw::EmptySpan => Span::OUTSIDE,
            _ => Span::new(Content::Unknown, inside.pages),
        }
    }

    fn unit(&self, block: BlockId, page: PageIndex) -> PageRun {
        let page = if self.flaw == Flaw::OtherUnit { PageIndex(page.0 ^ 1) } else { page };
        PageRun::single(block, page)
    }
}

impl PageSource for Broken {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        if self.flaw == Flaw::StartsOnce && self.started.swap(true, Ordering::Relaxed) {
            return Err(injected("it was started before"));
        }
        Ok(Box::new(BrokenFeed { source: self.clone(), sink, stopped: AtomicBool::new(false) }))
    }
}

/// Answers on the thread that asks.
#[derive(Debug)]
struct BrokenFeed {
    source: Broken,
    sink: Arc<dyn PageSink>,
    stopped: AtomicBool,
}

impl Feed for BrokenFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        if self.stopped.load(Ordering::Relaxed) {
            return Answer::Here;
        }
        match self.source.flaw {
            Flaw::HereWithoutAnswer => return Answer::Here,
            Flaw::NoAnswer => return Answer::Later,
            _ => {}
        }
        let watched = Watched { sink: &*self.sink, stopped: &self.stopped };
        self.source.deliver(&watched, run);
        Answer::Here
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        if self.source.flaw == Flaw::FinishHangs {
            std::mem::forget(self);
            loop {
                thread::park();
            }
        }
        if self.source.flaw == Flaw::DropHangs {
            self.sink.end(End::Stopped);
            std::mem::forget(self);
        }
        Ok(())
    }
}

impl Drop for BrokenFeed {
    fn drop(&mut self) {
        let late = || {
            let page = PageRun::single(BlockId(0), PageIndex(0));
            let _ = self.sink.data(page, PageBytes::from_slice(self.source.oracle.run(page)));
        };
        match self.source.flaw {
            Flaw::NoEnd => return,
            Flaw::DropHangs => loop {
                thread::park();
            },
            Flaw::AfterDrop => {
                let (sink, oracle) = (Arc::clone(&self.sink), Arc::clone(&self.source.oracle));
                thread::spawn(move || {
                    thread::park_timeout(std::time::Duration::from_millis(5));
                    let page = PageRun::single(BlockId(0), PageIndex(0));
                    let _ = sink.data(page, PageBytes::from_slice(oracle.run(page)));
                });
            }
            _ => {}
        }
        self.sink.end(End::Stopped);
        match self.source.flaw {
            Flaw::TwoEnds => self.sink.end(End::Stopped),
            Flaw::AfterEnd => late(),
            _ => {}
        }
    }
}

/// Notes that the sink takes no more.
#[derive(Debug)]
struct Watched<'a> {
    sink: &'a dyn PageSink,
    stopped: &'a AtomicBool,
}

impl Watched<'_> {
    fn seen(&self, reply: Reply) -> Reply {
        self.stopped.fetch_or(matches!(reply, Reply::Stop(_)), Ordering::Relaxed);
        reply
    }
}

impl PageSink for Watched<'_> {
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
        self.sink.end(end);
    }
}

/// A stream of the pages of an oracle, with a flaw.
#[derive(Debug)]
pub(crate) struct BrokenOneShot(Broken);

impl BrokenOneShot {
    pub(crate) fn new(oracle: &Arc<Oracle>, flaw: Flaw) -> BrokenOneShot {
        BrokenOneShot(Broken::new(oracle, flaw))
    }
}

impl OneShot for BrokenOneShot {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::new(self.0.clone())
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let (source, stopped) = (self.0, Arc::new(AtomicBool::new(false)));
        let (flaw, stop) = (source.flaw, Arc::clone(&stopped));
        let thread = thread::spawn(move || {
            let end = FlawedEnd { sink, flaw };
            let mut all: Vec<PageRun> = source.layout().runs().flat_map(|run| run.pieces(PageCount(7))).collect();
            if flaw == Flaw::Twice {
                all.push(all[0]);
            }
            if flaw == Flaw::CompleteTooEarly {
                all.truncate(3);
            }
            for run in all {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let watched = Watched { sink: &*end.sink, stopped: &stop };
                source.deliver(&watched, run);
            }
            if !stop.load(Ordering::Acquire) {
                end.complete();
            }
        });
        Ok(Box::new(StreamFeed { flaw, stopped, thread: Some(thread) }))
    }
}

/// Says the end when the thread leaves.
struct FlawedEnd {
    sink: Arc<dyn PageSink>,
    flaw: Flaw,
}

impl FlawedEnd {
    fn complete(self) {
        if self.flaw != Flaw::NoEnd {
            self.sink.end(End::Complete);
        }
        if self.flaw != Flaw::TwoEnds {
            std::mem::forget(self);
        }
    }
}

impl Drop for FlawedEnd {
    fn drop(&mut self) {
        if self.flaw == Flaw::NoEnd || self.flaw == Flaw::DiesSilently && thread::panicking() {
            return;
        }
        let broken = || End::Broken(SourceError::stopped("the thread died"));
        self.sink.end(if thread::panicking() { broken() } else { End::Stopped });
    }
}

#[derive(Debug)]
struct StreamFeed {
    flaw: Flaw,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Feed for StreamFeed {
    fn request(&self, _: PageRun, _: Urgency) -> Answer {
        if self.flaw == Flaw::AnswersHere { Answer::Here } else { Answer::Later }
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        if self.flaw == Flaw::FinishHangs {
            // A thread may be unparked for no reason.
            loop {
                thread::park();
            }
        }
        Ok(())
    }
}

impl Drop for StreamFeed {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// What is wrong with a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SinkFlaw {
    None,
    TakesAnyLength,
    TakesOutside,
    PanicsOutside,
    TakesUnreadable,
    AbsentIsZero,
    WholeWhenStopped,
    WholeWithoutFailed,
    NeverWhole,
    RefusesTwice,
}

/// Forgets what comes, and notes whether all has.
#[derive(Debug)]
pub(crate) struct BrokenSink {
    layout: Layout,
    flaw: SinkFlaw,
    seen: Mutex<PageSet>,
    wrong: AtomicBool,
    complete: AtomicBool,
}

impl BrokenSink {
    pub(crate) fn new(layout: &Layout, flaw: SinkFlaw) -> Arc<BrokenSink> {
        let seen = Mutex::new(PageSet::new(layout));
        let (wrong, complete) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(BrokenSink { layout: layout.clone(), flaw, seen, wrong, complete })
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.complete.load(Ordering::Acquire)
            && !self.wrong.load(Ordering::Acquire)
            && self.flaw != SinkFlaw::NeverWhole
    }

    fn refuse(&self, why: &str) -> Reply {
        self.wrong.store(true, Ordering::Release);
        SinkError::stopped(why).into()
    }

    fn take(&self, run: PageRun) -> Reply {
        if !self.layout.contains(run) {
            return match self.flaw {
                SinkFlaw::TakesOutside => Reply::Taken,
                SinkFlaw::PanicsOutside => panic!("{run} is outside"),
                _ => self.refuse("outside"),
            };
        }
        if self.seen.lock().insert(run) != run.pages && self.flaw == SinkFlaw::RefusesTwice {
            return self.refuse("twice");
        }
        Reply::Taken
    }
}

impl PageSink for BrokenSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        if bytes.len() != run.len() && self.flaw != SinkFlaw::TakesAnyLength {
            return self.refuse("another length");
        }
        let mut copy = vec![0; bytes.len().get()];
        if bytes.copy_to(&mut copy).is_err() && self.flaw != SinkFlaw::TakesUnreadable {
            return Reply::Unreadable(run);
        }
        self.take(run)
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(run)
    }

    fn absent(&self, _: PageRun) -> Reply {
        if self.flaw == SinkFlaw::AbsentIsZero { Reply::Taken } else { self.refuse("nothing below") }
    }

    fn failed(&self, _: PageRun, _: SourceError) -> Reply {
        if self.flaw == SinkFlaw::WholeWithoutFailed { Reply::Taken } else { self.refuse("failed") }
    }

    fn end(&self, end: End) {
        if matches!(end, End::Complete) || self.flaw == SinkFlaw::WholeWhenStopped {
            self.complete.store(true, Ordering::Release);
        }
    }
}
