//! A source that behaves like a network peer.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use page_source::{End, Feed, Flow, PageSink, PageSource, SourceError, Span, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};
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
    pub fn sending_each_page_once(mut self) -> LateSource {
        self.repeatable = false;
        self
    }

    /// Before each piece that is sent, its thread comes to this gate.
    #[must_use]
    pub fn with_gate(mut self, gate: Gate) -> LateSource {
        self.gate = gate;
        self
    }
}

impl PageSource for LateSource {
    fn layout(&self) -> &Layout {
        self.oracle.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        known(&self.oracle, block, first, false)
    }

    fn repeatable(&self) -> bool {
        self.repeatable
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let sent = self.oracle.layout().blocks().iter().map(|block| vec![false; block.pages().to_bytes().get() / 4096]);
        let shared = Arc::new(Shared {
            source: self.clone(),
            sink,
            state: Mutex::new(State { pending: Vec::new(), sent: sent.collect(), answered: Vec::new() }),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            living: AtomicUsize::new(self.threads),
            panicked: AtomicBool::new(false),
        });
        let threads = (0..self.threads as u64).map(|i| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.answer(StdRng::seed_from_u64(shared.source.seed.wrapping_add(i))))
        });
        let threads = threads.collect();
        Ok(Box::new(LateFeed { shared, threads }))
    }
}

#[derive(Debug)]
struct Shared {
    source: LateSource,
    sink: Arc<dyn PageSink>,
    state: Mutex<State>,
    wake: Condvar,
    stop: AtomicBool,
    living: AtomicUsize,
    panicked: AtomicBool,
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
    fn answer(&self, mut random: StdRng) {
        let _last_words = LastWords(self);
        while let Some(piece) = self.next(&mut random) {
            if !self.source.gate.enter_unless(&self.stop) {
                return;
            }
            if self.send(piece, false).is_break() {
                return;
            }
            if self.source.unasked && random.random_range(0..4) == 0 {
                let all: Vec<_> = self.source.layout().runs().filter(|run| !run.is_empty()).collect();
                let all = all[random.random_range(0..all.len())];
                let first = random.random_range(0..all.pages.0);
                let pages = PageCount(random.random_range(1..=4.min(all.pages.0 - first)));
                if self.send(PageRun::new(all.block, PageIndex(first), pages), false).is_break() {
                    return;
                }
            }
            if self.source.repeatable && random.random_range(0..4) == 0 {
                let twice = {
                    let state = self.state.lock();
                    state.answered[random.random_range(0..state.answered.len())]
                };
                if self.send(twice, true).is_break() {
                    return;
                }
            }
        }
    }

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

    fn send(&self, run: PageRun, again: bool) -> Flow {
        let mut fresh = Vec::new();
        {
            let mut state = self.state.lock();
            for page in run.iter() {
                let sent = &mut state.sent[run.block.0 as usize][page.byte_offset().get() / 4096];
                if !*sent || self.source.repeatable || again {
                    fresh.push(page);
                }
                *sent = true;
            }
            if state.answered.len() < 64 {
                state.answered.push(run);
            }
        }
        if fresh.len() as u64 == run.pages.0 {
            return deliver(&self.source.oracle, &*self.sink, run);
        }
        for page in fresh {
            deliver(&self.source.oracle, &*self.sink, PageRun::single(run.block, page))?;
        }
        ControlFlow::Continue(())
    }
}

/// Whatever happens to a thread, the last one says so.
struct LastWords<'a>(&'a Shared);

impl Drop for LastWords<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.panicked.store(true, Ordering::Release);
            self.0.stop();
        }
        if self.0.living.fetch_sub(1, Ordering::AcqRel) == 1 && self.0.panicked.load(Ordering::Acquire) {
            let (peer, reason) = ("late source".to_owned(), "its thread panicked".to_owned());
            self.0.sink.end(End::Broken(SourceError::Peer { peer, reason }));
        }
    }
}

#[derive(Debug)]
struct LateFeed {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Feed for LateFeed {
    fn request(&self, run: PageRun, _: Urgency) {
        if !run.is_empty() {
            self.shared.state.lock().pending.push(run);
            self.shared.wake.notify_all();
        }
    }

    fn alive(&self) -> bool {
        self.shared.living.load(Ordering::Acquire) > 0
    }
}

impl Drop for LateFeed {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            // A panic has been told to the sink.
            drop(thread.join());
        }
    }
}
