//! The sink between source and sink that knows which pages have arrived.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};

use super::{Progress, PumpOptions, Pumped};
use crate::{Content, PageSet, PageSink, Pages, Reply, SinkError, SourceError, SourceErrorKind, Subject};

/// How far it is asked at a time what the source knows: 1 GiB.
const LOOK_AHEAD: PageCount = PageCount(1 << 18);

/// Why it ended early.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    Source(SourceError),
    Sink(SinkError),
}

#[derive(Debug)]
pub(super) struct Relay {
    layout: Layout,
    pub(super) sink: Arc<dyn PageSink>,
    pub(super) find_zeros: bool,
    piece: PageCount,
    window: PageCount,
    pub(super) state: Mutex<State>,
    /// Something in the state has changed that somebody may wait for.
    pub(super) changed: Condvar,
}

#[derive(Debug)]
pub(super) struct State {
    ended: PageSet,
    /// Everything before it was asked for, or needs not to be.
    cursor: (BlockId, PageIndex),
    /// Asked for, and not there.
    outstanding: PageCount,
    pumped: Pumped,
    working: usize,
    /// The source has said that what has not arrived is zero.
    pub(super) complete: bool,
    /// The source answers no more.
    pub(super) ended_early: bool,
    stop: Option<Stop>,
}

impl Relay {
    pub(super) fn new(layout: Layout, sink: Arc<dyn PageSink>, options: &PumpOptions<'_>) -> Relay {
        let state = State {
            ended: PageSet::new(&layout),
            cursor: (BlockId(0), PageIndex(0)),
            outstanding: PageCount(0),
            pumped: Pumped::default(),
            working: options.threads.max(1),
            complete: false,
            ended_early: false,
            stop: None,
        };
        Relay {
            layout,
            sink,
            find_zeros: options.find_zeros,
            piece: options.piece.max(PageCount(1)),
            window: options.window,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// The next run to be asked for, once there is space in the window for it. `None` at the end.
    pub(super) fn next(&self, source: &dyn Pages) -> Option<PageRun> {
        let mut state = self.state.lock();
        loop {
            if state.stop.is_some() || state.complete || state.ended_early {
                return None;
            }
            let (block, first) = state.cursor;
            let pages = self.layout.get(block)?.pages();
            if first.0 >= pages.0 {
                state.cursor = (BlockId(block.0 + 1), PageIndex(0));
                continue;
            }
            let rest = PageRun::new(block, first, PageCount(pages.0 - first.0));
            let span = source.content(rest.split_at(LOOK_AHEAD).0);
            if matches!(span.content, Content::Zero | Content::Absent) && span.pages > PageCount(0) {
                let (told, _) = rest.split_at(span.pages);
                state.advance(told);
                drop(state);
                let reply = if span.content == Content::Zero { self.zero(told) } else { self.absent(told) };
                if !reply.is_taken() {
                    return None;
                }
                state = self.state.lock();
                continue;
            }
            let (known, _) = rest.split_at(span.pages.max(PageCount(1)));
            let gap = state.ended.first_gap(known);
            if gap.is_empty() {
                state.advance(known);
                continue;
            }
            let (run, _) = gap.split_at(self.piece);
            if state.outstanding > PageCount(0) && state.outstanding.0 + run.pages.0 > self.window.0 {
                self.changed.wait(&mut state);
                continue;
            }
            let end = run.end() - first;
            state.advance(rest.split_at(end).0);
            return Some(run);
        }
    }

    /// Waits for the end.
    pub(super) fn wait(&self) {
        let mut state = self.state.lock();
        while !state.over() {
            self.changed.wait(&mut state);
        }
    }

    /// Waits a while for the end. Whether it has come.
    pub(super) fn wait_for(&self, at_most: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.over() {
            self.changed.wait_for(&mut state, at_most);
        }
        state.over()
    }

    pub(super) fn progress(&self) -> Progress {
        let pumped = self.state.lock().pumped;
        Progress { done: pumped.stored + pumped.zero + pumped.absent, total: self.layout.total().to_pages() }
    }

    /// What came of it, when the feed is gone.
    pub(super) fn finish(&self) -> Result<Pumped, Stop> {
        loop {
            let state = self.state.lock();
            if let Some(stop) = &state.stop {
                return Err(stop.clone());
            }
            let gap = self.layout.runs().map(|run| state.ended.first_gap(run)).find(|gap| !gap.is_empty());
            let Some(gap) = gap else {
                return Ok(state.pumped);
            };
            if !state.complete {
                return Err(Stop::Source(source_error(
                    SourceErrorKind::PeerGone,
                    gap,
                    "it ended before they had come",
                )));
            }
            drop(state);
            if let Reply::Stop(error) = self.zero(gap) {
                return Err(Stop::Sink(error));
            }
        }
    }

    /// To be held by a thread that asks.
    pub(super) fn working(&self) -> Working<'_> {
        Working(self)
    }

    pub(super) fn stop(&self, state: &mut State, stop: Stop) {
        state.stop.get_or_insert(stop);
        self.changed.notify_all();
    }

    /// `run` was given to the sink, which said `reply`.
    pub(super) fn given(&self, run: PageRun, kind: Kind, reply: Reply) -> Reply {
        let mut state = self.state.lock();
        match &reply {
            Reply::Taken => {
                let asked = state.asked_of(run);
                let waited_for = state.ended.lacking(asked);
                let fresh = state.ended.insert(run);
                state.outstanding = PageCount(state.outstanding.0 - waited_for.0);
                let pumped = &mut state.pumped;
                match kind {
                    Kind::Data => pumped.stored += fresh,
                    Kind::Zero => pumped.zero += fresh,
                    Kind::Absent => pumped.absent += fresh,
                }
                pumped.again += run.pages - fresh;
                self.changed.notify_all();
            }
            // The source says what is wrong, in `failed`.
            Reply::Unreadable(_) => {}
            Reply::Stop(error) => self.stop(&mut state, Stop::Sink(error.clone())),
        }
        reply
    }

    /// Whether the sink may have `run`.
    pub(super) fn admit(&self, run: PageRun) -> ControlFlow<Reply> {
        let mut state = self.state.lock();
        if !self.layout.contains(run) {
            let error =
                source_error(SourceErrorKind::Protocol, run, "it sent these pages, which are outside its layout");
            self.stop(&mut state, Stop::Source(error));
        }
        match state.stop {
            Some(_) => ControlFlow::Break(SinkError::stopped("the pump has stopped").into()),
            None => ControlFlow::Continue(()),
        }
    }
}

/// What came.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Data,
    Zero,
    Absent,
}

fn source_error(kind: SourceErrorKind, run: PageRun, what: &str) -> SourceError {
    SourceError::new(kind, Subject::peer("the source").run(run), format!("{run}: {what}"))
}

impl State {
    /// The cursor goes over `run`, at which it stands.
    fn advance(&mut self, run: PageRun) {
        self.outstanding += self.ended.lacking(run);
        self.cursor = (run.block, run.end());
    }

    /// The part of `run` that the cursor has passed.
    fn asked_of(&self, run: PageRun) -> PageRun {
        let (block, page) = self.cursor;
        let pages = match run.block.cmp(&block) {
            std::cmp::Ordering::Less => run.pages,
            std::cmp::Ordering::Equal => PageCount(page.0.saturating_sub(run.first.0)),
            std::cmp::Ordering::Greater => PageCount(0),
        };
        run.split_at(pages).0
    }

    fn over(&self) -> bool {
        self.stop.is_some()
            || self.complete
            || self.ended_early
            || (self.working == 0 && self.outstanding == PageCount(0))
    }
}

/// A thread is asking; when it ends, however it does, this is dropped.
#[derive(Debug)]
pub(super) struct Working<'a>(&'a Relay);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.working -= 1;
        if thread::panicking() {
            self.0.stop(&mut state, Stop::Source(SourceError::stopped("a thread panicked")));
        }
        self.0.changed.notify_all();
    }
}
