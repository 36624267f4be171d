//! Sinks that are ready to use: one that keeps what comes, and one that counts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use page_units::{Layout, PageCount, PageRun};
use parking_lot::{Condvar, Mutex};

use crate::{End, PageBytes, PageSet, PageSink, Reply, SinkError, SourceError};

/// A sink that keeps every page in memory: for tests and small tools.
///
/// A layer that says [`absent`](PageSink::absent) is kept as such; [`bytes`](Collect::bytes) has nothing for such pages.
#[derive(Debug)]
pub struct Collect {
    layout: Layout,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    bytes: Vec<Vec<u8>>,
    /// Pages of which the content is known, zeros among them.
    known: PageSet,
    absent: PageSet,
    failed: Vec<(PageRun, SourceError)>,
    ends: Vec<End>,
}

impl Collect {
    /// Takes the pages of this layout. Needs as much memory.
    #[must_use]
    pub fn new(layout: &Layout) -> Arc<Collect> {
        let bytes = layout.blocks().iter().map(|block| vec![0; block.length().get()]).collect();
        let (known, absent) = (PageSet::new(layout), PageSet::new(layout));
        let state = State { bytes, known, absent, failed: Vec::new(), ends: Vec::new() };
        Arc::new(Collect { layout: layout.clone(), state: Mutex::new(state), changed: Condvar::new() })
    }

    /// The content of `run`, if all of it has come.
    #[must_use]
    pub fn bytes(&self, run: PageRun) -> Option<Vec<u8>> {
        let mut state = self.state.lock();
        let known = self.layout.contains(run) && state.known.lacking(run).0 == 0;
        known.then(|| state.slice(run).to_vec())
    }

    /// Whether the source has said of all of `run` that it has nothing to say.
    #[must_use]
    pub fn is_absent(&self, run: PageRun) -> bool {
        self.layout.contains(run) && self.state.lock().absent.lacking(run).0 == 0
    }

    /// What failed, in the order in which it did.
    #[must_use]
    pub fn failed(&self) -> Vec<(PageRun, SourceError)> {
        self.state.lock().failed.clone()
    }

    /// How the flow ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.state.lock().ends.first().cloned()
    }

    /// Waits until all pages of `run` have come or failed, or the flow has ended; whether all have come.
    pub fn wait(&self, run: PageRun) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.known.lacking(run).0 == 0 {
                return true;
            }
            let gone = state.failed.iter().any(|(failed, _)| !failed.intersect(run).is_empty());
            if gone || !state.ends.is_empty() || state.absent.lacking(run) != run.pages {
                return false;
            }
            self.changed.wait(&mut state);
        }
    }

    fn take(&self, run: PageRun, take: impl FnOnce(&mut State) -> Reply) -> Reply {
        if !self.layout.contains(run) {
            return SinkError::stopped(format_args!("{run}, which is outside the layout")).into();
        }
        let reply = take(&mut self.state.lock());
        self.changed.notify_all();
        reply
    }
}

impl State {
    fn slice(&mut self, run: PageRun) -> &mut [u8] {
        let at = run.first.byte_offset().get();
        &mut self.bytes[run.block.0 as usize][at..at + run.len().get()]
    }
}

impl PageSink for Collect {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        if bytes.len() != run.len() {
            return SinkError::stopped(format_args!("{} bytes for {run}", bytes.len())).into();
        }
        self.take(run, |state| match bytes.copy_to(state.slice(run)) {
            Ok(()) => {
                state.known.insert(run);
                Reply::Taken
            }
            Err(_) => Reply::Unreadable(run),
        })
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(run, |state| {
            state.slice(run).fill(0);
            state.known.insert(run);
            Reply::Taken
        })
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.take(run, |state| {
            state.absent.insert(run);
            Reply::Taken
        })
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.take(run, |state| {
            state.failed.push((run, error));
            Reply::Taken
        })
    }

    fn end(&self, end: End) {
        self.state.lock().ends.push(end);
        self.changed.notify_all();
    }
}

/// A sink that only counts pages.
#[derive(Debug, Default)]
pub struct Null {
    counts: [AtomicU64; 4],
    end: Mutex<Option<End>>,
}

/// What a [`Null`] has been given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counted {
    /// Pages with content.
    pub data: PageCount,
    /// Pages of zeros.
    pub zero: PageCount,
    /// Pages about which the source has nothing to say.
    pub absent: PageCount,
    /// Pages that failed.
    pub failed: PageCount,
}

impl Null {
    /// Takes everything.
    #[must_use]
    pub fn new() -> Arc<Null> {
        Arc::default()
    }

    /// How many pages came, of each kind.
    #[must_use]
    pub fn counted(&self) -> Counted {
        let [data, zero, absent, failed] = [0, 1, 2, 3].map(|at| PageCount(self.counts[at].load(Ordering::Relaxed)));
        Counted { data, zero, absent, failed }
    }

    /// How the flow ended, if it has.
    #[must_use]
    pub fn ended(&self) -> Option<End> {
        self.end.lock().clone()
    }

    fn count(&self, at: usize, run: PageRun) -> Reply {
        self.counts[at].fetch_add(run.pages.0, Ordering::Relaxed);
        Reply::Taken
    }
}

impl PageSink for Null {
    fn data(&self, run: PageRun, _: PageBytes<'_>) -> Reply {
        self.count(0, run)
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.count(1, run)
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.count(2, run)
    }

    fn failed(&self, run: PageRun, _: SourceError) -> Reply {
        self.count(3, run)
    }

    fn end(&self, end: End) {
        self.end.lock().get_or_insert(end);
    }
}
