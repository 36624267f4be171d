//! Two sources, one over the other: what the upper one has nothing to say about comes from the lower one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use page_source::conformance::{Page, Suite};
use page_source::{
    Answer, Content, End, EndGuard, Feed, OneEnd, PageBytes, PageSink, PageSource, Pages, PumpOptions, Reply,
    SharedFeed, SinkError, SourceError, Span, Urgency, deliver, pump,
};
use page_units::{ByteLen, Layout, PageCount, PageRun, PageSize, RamBlock};
use testkit::collector::Collector;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;

/// The upper source over the lower one, which have the same layout.
#[derive(Debug)]
struct Layered<U, L> {
    upper: U,
    lower: L,
}

impl<U: Pages, L: Pages> Pages for Layered<U, L> {
    fn layout(&self) -> &Layout {
        self.upper.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        let span = self.upper.content(run);
        match span.content {
            Content::Absent => self.lower.content(run.split_at(span.pages).0),
            Content::Zero | Content::Stored | Content::Unknown => span,
        }
    }
}

impl<U: PageSource, L: PageSource> PageSource for Layered<U, L> {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let end = Arc::new(OneEnd::new(sink));
        let lower = match self.lower.start(Arc::clone(&end) as Arc<dyn PageSink>) {
            Ok(feed) => Arc::new(SharedFeed::new(feed)),
            Err(error) => return Err(error),
        };
        let below = Below { sink: Arc::clone(&end), lower: Arc::clone(&lower), late: AtomicBool::new(false) };
        let below = Arc::new(below);
        match self.upper.start(Arc::clone(&below) as Arc<dyn PageSink>) {
            Ok(upper) => Ok(Box::new(LayeredFeed { upper: Some(upper), below })),
            Err(error) => {
                end.never_started();
                Err(error)
            }
        }
    }
}

/// The sink of the upper source.
#[derive(Debug)]
struct Below {
    sink: Arc<OneEnd>,
    lower: Arc<SharedFeed>,
    /// The lower source has answered from another thread.
    late: AtomicBool,
}

impl PageSink for Below {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.sink.data(run, bytes)
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.sink.zero(run)
    }

    fn absent(&self, run: PageRun) -> Reply {
        match self.lower.request(run, Urgency::Demand) {
            Some(Answer::Here) => Reply::Taken,
            Some(Answer::Later) => {
                self.late.store(true, Ordering::Release);
                Reply::Taken
            }
            None => SinkError::stopped("the lower source was finished").into(),
        }
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.sink.failed(run, error)
    }

    fn end(&self, end: End) {
        // Of a flow that is ended from here, the lower source speaks last.
        if !matches!(end, End::Stopped) {
            self.sink.end(end);
        }
    }
}

#[derive(Debug)]
struct LayeredFeed {
    upper: Option<Box<dyn Feed>>,
    below: Arc<Below>,
}

impl Feed for LayeredFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        let answer = self.upper.as_ref().map_or(Answer::Later, |upper| upper.request(run, urgency));
        if self.below.late.load(Ordering::Acquire) { Answer::Later } else { answer }
    }

    fn finish(mut self: Box<Self>) -> Result<(), SourceError> {
        let upper = self.upper.take().map_or(Ok(()), Feed::finish);
        let lower = self.below.lower.finish();
        upper.and(lower)
    }
}

impl Drop for LayeredFeed {
    fn drop(&mut self) {
        drop(self.upper.take());
        let _ = self.below.lower.finish();
    }
}

/// What is above: pages of an oracle, but for some of which it says nothing, at once or when it is asked.
#[derive(Clone, Debug)]
struct Upper {
    oracle: Arc<Oracle>,
    says: Content,
}

fn is_absent(run: PageRun) -> bool {
    run.first.0 % 10 < 4
}

impl Pages for Upper {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        let inside = self.layout().clip(run);
        let one = inside.pages.min(PageCount(1));
        match self.says {
            Content::Unknown => Span::new(Content::Unknown, inside.pages),
            says if is_absent(run) => Span::new(says, one),
            _ => Span::new(Content::Stored, one),
        }
    }
}

impl PageSource for Upper {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        Ok(Box::new(UpperFeed(self.clone(), EndGuard::new(sink))))
    }
}

#[derive(Debug)]
struct UpperFeed(Upper, EndGuard);

impl Feed for UpperFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        let UpperFeed(upper, end) = self;
        let unreadable = |_| SourceError::stopped("memory of our own");
        let mut pages = run.pieces(PageCount(1));
        // Until the sink takes no more.
        let _ = pages.try_for_each(|one| match is_absent(one) {
            true => end.sink().absent(one).branch(),
            false => deliver(end.sink(), one, PageBytes::from_slice(upper.oracle.run(one)), unreadable),
        });
        Answer::Here
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}

fn oracle(seed: u64) -> Arc<Oracle> {
    let block = RamBlock::new("ram", ByteLen(120 << 12), PageSize::SMALL).unwrap();
    Arc::new(Oracle::random(seed, Layout::new(vec![block]).unwrap(), 160))
}

#[test]
fn what_is_absent_above_comes_from_below() {
    let (above, below) = (oracle(1), oracle(2));
    let (up, down) = (Arc::clone(&above), Arc::clone(&below));
    let right = move |one: PageRun| if is_absent(one) { down.run(one).to_vec() } else { up.run(one).to_vec() };
    let suite = Suite::new({
        let right = right.clone();
        move |one| Page::Content(right(one))
    });
    for says in [Content::Absent, Content::Unknown] {
        let upper = || Upper { oracle: Arc::clone(&above), says };
        let lower = MemorySource::new(Arc::clone(&below));
        // Of what comes unasked from below, a layer would have to ask whether the upper one has it.
        let late = LateSource::new(Arc::clone(&below), 5).with_unasked(false);
        let sources: [Arc<dyn PageSource>; 3] = [
            Arc::new(Layered { upper: upper(), lower: lower.clone() }),
            Arc::new(Layered { upper: upper(), lower: lower.knowing_nothing() }),
            Arc::new(Layered { upper: upper(), lower: late }),
        ];
        for (number, source) in sources.into_iter().enumerate() {
            suite.source(Arc::clone(&source)).unwrap_or_else(|breach| panic!("{says:?}, {number}: {breach}"));
            let sink = Collector::new();
            pump(source, Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default()).unwrap();
            assert!(matches!(sink.state.lock().ends[..], [End::Complete]));
        }
    }
}

/// The upper source alone: a sink with nothing below takes it for an error, and not for zeros.
#[test]
fn without_a_layer_below_an_absent_page_is_absent() {
    let above = oracle(1);
    for says in [Content::Absent, Content::Unknown] {
        let source = Arc::new(Upper { oracle: Arc::clone(&above), says });
        let expected = Arc::clone(&above);
        let suite = Suite::new(move |one| match is_absent(one) {
            true => Page::Absent,
            false => Page::Content(expected.run(one).to_vec()),
        });
        suite.source(Arc::clone(&source) as Arc<dyn PageSource>).unwrap();
        let sink = Collector::new();
        let pumped = pump(source, Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default()).unwrap();
        assert_eq!(pumped.absent, PageCount(48));
    }
}
