//! A source that behaves like a network peer.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use page_source::{Answer, EndGuard, Feed, OneShot, PageSink, PageSource, Pages, Reply, SourceError, Span, Urgency};
use page_units::{Layout, PageCount, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::gate::Gate;
use crate::oracle::Oracle;
use crate::source::{deliver, known};

/// Answers from its own threads: late, in random pieces and order, with pages nobody asked for, and some twice. What
/// it does follows from the seed alone, but for what threads do to each other.
#[derive(Clone, Debug)]
pub struct LateSource {
    oracle: Arc<Oracle>,
    seed: u64,
    threads: usize,
    unasked: bool,
    repeatable: bool,
    gate: Gate,
}

impl LateSource {
    /// A source of `oracle`'s pages with one thread, which sends pages unasked and twice.
    #[must_use]
    pub fn new(oracle: Arc<Oracle>, seed: u64) -> LateSource {
        LateSource { oracle, seed, threads: 1, unasked: true, repeatable: true, gate: Gate::open_at_first() }
    }

    /// How many threads answer.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> LateSource {
        self.threads = threads.max(1);
        self
    }

    /// Whether pages come that nobody asked for.
    #[must_use]
    pub fn with_unasked(mut self, unasked: bool) -> LateSource {
        self.unasked = unasked;
        self
    }

    /// Sends each page once in its life, as a postcopy peer does; nothing comes twice then.
    #[must_use]
    pub fn sending_each_page_once(mut self) -> LatePeer {
        self.repeatable = false;
        LatePeer(self)
    }

    /// Before each piece that is sent, its thread comes to this gate.
    #[must_use]
    pub fn with_gate(mut self, gate: Gate) -> LateSource {
        self.gate = gate;
        self
    }
}

impl Pages for LateSource {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        known(&self.oracle, run, false)
    }
}

impl PageSource for LateSource {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let sent = self.oracle.layout().blocks().iter().map(|block| vec![false; block.pages().to_bytes().get() / 4096]);
        let shared = Arc::new(Shared {
            source: self.clone(),
            state: Mutex::new(State { pending: Vec::new(), sent: sent.collect(), answered: Vec::new() }),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let end = EndGuard::new(sink);
        let threads = (0..self.threads as u64).map(|i| {
            let answering = Answering { shared: Arc::clone(&shared), end: end.clone() };
            let random = StdRng::seed_from_u64(self.seed.wrapping_add(i));
            thread::spawn(move || answering.answer(random))
        });
        let threads = threads.collect();
        Ok(Box::new(LateFeed { shared, threads }))
    }
}

/// A [`LateSource`] that sends each page once in its life.
#[derive(Clone, Debug)]
pub struct LatePeer(LateSource);

impl OneShot for LatePeer {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::new(self.0.clone())
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        self.0.start(sink)
    }
}

#[derive(Debug)]
struct Shared {
    source: LateSource,
    state: Mutex<State>,
    wake: Condvar,
    stop: AtomicBool,
}

#[derive(Debug)]
struct State {
    pending: Vec<PageRun>,
    /// Per block and page, whether it was sent.
    sent: Vec<Vec<bool>>,
    /// Some of what was sent, to be sent again.
    answered: Vec<PageRun>,
}

impl Shared {
    fn stop(&self) {
        {
            let _state = self.state.lock();
            self.stop.store(true, Ordering::Release);
            self.wake.notify_all();
        }
        self.source.gate.wake();
    }

    /// A random piece of a random request; what is left of the request stays.
    fn next(&self, random: &mut StdRng) -> Option<PageRun> {
        let mut state = self.state.lock();
        loop {
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            if !state.pending.is_empty() {
                break;
            }
            self.wake.wait(&mut state);
        }
        let index = random.random_range(0..state.pending.len());
        let run = state.pending.swap_remove(index);
        let (before, rest) = run.split_at(PageCount(random.random_range(0..run.pages.0)));
        let (piece, after) = rest.split_at(PageCount(random.random_range(1..=rest.pages.0.min(32))));
        state.pending.extend([before, after].into_iter().filter(|run| !run.is_empty()));
        Some(piece)
    }
}

/// One thread. The last one to end says how the flow ended; if one panics, all end.
struct Answering {
    shared: Arc<Shared>,
    end: EndGuard,
}

impl Answering {
    fn answer(self, mut random: StdRng) {
        while let Some(piece) = self.shared.next(&mut random) {
            if !self.shared.source.gate.enter_unless(&self.shared.stop) {
                return;
            }
            if self.send(piece, false).is_break() {
                return;
            }
            if self.shared.source.unasked && random.random_range(0..4) == 0 {
                let all: Vec<_> = self.shared.source.layout().runs().filter(|run| !run.is_empty()).collect();
                let all = all[random.random_range(0..all.len())];
                let first = random.random_range(0..all.pages.0);
                let pages = PageCount(random.random_range(1..=4.min(all.pages.0 - first)));
                if self.send(PageRun::new(all.block, PageIndex(first), pages), false).is_break() {
                    return;
                }
            }
            if self.shared.source.repeatable && random.random_range(0..4) == 0 {
                let twice = {
                    let state = self.shared.state.lock();
                    state.answered[random.random_range(0..state.answered.len())]
                };
                if self.send(twice, true).is_break() {
                    return;
                }
            }
        }
    }

    fn send(&self, run: PageRun, again: bool) -> ControlFlow<Reply> {
        let mut fresh = Vec::new();
        {
            let mut state = self.shared.state.lock();
            for page in run.iter() {
                let sent = &mut state.sent[run.block.0 as usize][page.byte_offset().get() / 4096];
                if !*sent || self.shared.source.repeatable || again {
                    fresh.push(page);
                }
                *sent = true;
            }
            if state.answered.len() < 64 {
                state.answered.push(run);
            }
        }
        if fresh.len() as u64 == run.pages.0 {
            return deliver(&self.shared.source.oracle, self.end.sink(), run);
        }
        for page in fresh {
            deliver(&self.shared.source.oracle, self.end.sink(), PageRun::single(run.block, page))?;
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if thread::panicking() {
            self.shared.stop();
        }
    }
}

#[derive(Debug)]
struct LateFeed {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl LateFeed {
    fn end(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // A panic has been told to the sink.
            drop(thread.join());
        }
    }
}

impl Feed for LateFeed {
    fn request(&self, run: PageRun, _: Urgency) -> Answer {
        if !run.is_empty() {
            self.shared.state.lock().pending.push(run);
            self.shared.wake.notify_all();
        }
        Answer::Later
    }

    fn finish(mut self: Box<Self>) -> Result<(), SourceError> {
        self.end();
        Ok(())
    }
}

impl Drop for LateFeed {
    fn drop(&mut self) {
        self.end();
    }
}
