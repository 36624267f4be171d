//! The sink between source and sink that knows which pages have arrived.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};

use super::{Progress, PumpOptions, Pumped};
use crate::pages::PageSet;
use crate::zeros::deliver_without_zeros;
use crate::{Content, End, Flow, PageBytes, PageSink, PageSource, SinkError, SourceError};

/// Why it ended early.
#[derive(Clone, Debug)]
pub(super) enum Stop {
    Source(SourceError),
    Sink(SinkError),
}

#[derive(Debug)]
pub(super) struct Relay {
    layout: Layout,
    sink: Arc<dyn PageSink>,
    find_zeros: bool,
    piece: PageCount,
    window: PageCount,
    state: Mutex<State>,
    /// Something in the state has changed that somebody may wait for.
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    ended: PageSet,
    /// Everything before it was asked for, or needs not to be.
    cursor: (BlockId, PageIndex),
    /// Asked for, and not there.
    outstanding: PageCount,
    pumped: Pumped,
    working: usize,
    /// The source has said that what has not arrived is zero.
    complete: bool,
    /// The source can't answer any more.
    dead: bool,
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
            dead: false,
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

    /// The next run to be asked for, once there is room in the window for it. `None` at the end.
    pub(super) fn next(&self, source: &dyn PageSource) -> Option<PageRun> {
        let mut state = self.state.lock();
        loop {
            if state.stop.is_some() || state.complete || state.dead {
                return None;
            }
            let (block, first) = state.cursor;
            let pages = self.layout.get(block)?.pages();
            if first.0 >= pages.0 {
                state.cursor = (BlockId(block.0 + 1), PageIndex(0));
                continue;
            }
            let rest = PageRun::new(block, first, PageCount(pages.0 - first.0));
            let span = source.run_at(block, first);
            if span.content == Content::Zero && span.pages > PageCount(0) {
                let (zero, _) = rest.split_at(span.pages);
                state.advance(zero);
                drop(state);
                if self.zero(zero).is_break() {
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

    /// Waits a while for the end. Whether it has come.
    pub(super) fn wait(&self, at_most: Duration) -> bool {
        let mut state = self.state.lock();
        if !state.over() {
            self.changed.wait_for(&mut state, at_most);
        }
        state.over()
    }

    pub(super) fn progress(&self) -> Progress {
        let pumped = self.state.lock().pumped;
        Progress { done: pumped.stored + pumped.zero, total: self.layout.total().to_pages() }
    }

    /// The source admits that it can't answer any more. It may still say why.
    pub(super) fn source_died(&self) {
        self.state.lock().dead = true;
        self.changed.notify_all();
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
                let reason = format!("it died before {gap} had come");
                return Err(Stop::Source(SourceError::Peer { peer: "the source".to_owned(), reason }));
            }
            drop(state);
            if let ControlFlow::Break(error) = self.zero(gap) {
                return Err(Stop::Sink(error));
            }
        }
    }

    /// To be held by a thread that asks.
    pub(super) fn working(&self) -> Working<'_> {
        Working(self)
    }

    fn stop(&self, state: &mut State, stop: Stop) {
        state.stop.get_or_insert(stop);
        self.changed.notify_all();
    }

    /// `run` was given to the sink, which said `flow`.
    fn given(&self, run: PageRun, zero: bool, flow: Flow) -> Flow {
        let mut state = self.state.lock();
        match &flow {
            ControlFlow::Continue(()) => {
                let asked = state.asked_of(run);
                let waited_for = state.ended.lacking(asked);
                let fresh = state.ended.insert(run);
                state.outstanding = PageCount(state.outstanding.0 - waited_for.0);
                let pumped = &mut state.pumped;
                if zero {
                    pumped.zero += fresh
                } else {
                    pumped.stored += fresh
                }
                pumped.again += run.pages - fresh;
                self.changed.notify_all();
            }
            // The source says what is wrong, in `failed`.
            ControlFlow::Break(SinkError::Unreadable(_)) => {}
            ControlFlow::Break(error) => self.stop(&mut state, Stop::Sink(error.clone())),
        }
        flow
    }

    /// Whether the sink may have `run`.
    fn admit(&self, run: PageRun) -> Flow {
        let mut state = self.state.lock();
        if !self.layout.contains(run) {
            let reason = format!("it sent {run}, which is outside its own layout");
            self.stop(&mut state, Stop::Source(SourceError::Peer { peer: "the source".to_owned(), reason }));
        }
        match state.stop {
            Some(_) => ControlFlow::Break(SinkError::Stopped { reason: "the pump has stopped".to_owned() }),
            None => ControlFlow::Continue(()),
        }
    }
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
        self.stop.is_some() || self.complete || self.dead || (self.working == 0 && self.outstanding == PageCount(0))
    }
}

impl PageSink for Relay {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        self.admit(run)?;
        if self.find_zeros {
            let gone = |run, _| ControlFlow::Break(SinkError::Unreadable(run));
            return deliver_without_zeros(&Counting(self), run, bytes, gone);
        }
        Counting(self).data(run, bytes)
    }

    fn zero(&self, run: PageRun) -> Flow {
        self.admit(run)?;
        Counting(self).zero(run)
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Flow {
        self.admit(run)?;
        self.stop(&mut self.state.lock(), Stop::Source(error.clone()));
        self.sink.failed(run, error)
    }

    fn end(&self, end: End) {
        let mut state = self.state.lock();
        match end {
            End::Complete => {
                state.complete = true;
                self.changed.notify_all();
            }
            End::Broken(error) => self.stop(&mut state, Stop::Source(error)),
        }
    }
}

/// Gives pages to the sink and counts them.
#[derive(Debug)]
struct Counting<'a>(&'a Relay);

impl PageSink for Counting<'_> {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        self.0.given(run, false, self.0.sink.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Flow {
        self.0.given(run, true, self.0.sink.zero(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Flow {
        self.0.sink.failed(run, error)
    }

    fn end(&self, _: End) {}
}

/// A thread is asking; when it ends, however it does, this is dropped.
#[derive(Debug)]
pub(super) struct Working<'a>(&'a Relay);

impl Drop for Working<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.working -= 1;
        if thread::panicking() {
            let reason = "a thread panicked".to_owned();
            self.0.stop(&mut state, Stop::Source(SourceError::Stopped { reason }));
        }
        self.0.changed.notify_all();
    }
}
