//! Requests that wait for a thread.

use std::collections::VecDeque;

use page_units::{PageCount, PageRun};
use parking_lot::{Condvar, Mutex};

use crate::Urgency;

/// How much of the background one thread does before it looks whether something is in demand.
const PIECE: PageCount = PageCount(64);

/// What was requested, demand first.
#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct State {
    demand: VecDeque<PageRun>,
    background: VecDeque<PageRun>,
    stop: bool,
}

impl Queue {
    /// Adds a request, unless it was stopped.
    pub(super) fn push(&self, run: PageRun, urgency: Urgency) {
        let mut state = self.state.lock();
        if run.is_empty() || state.stop {
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
        self.filled.notify_all();
    }

    /// The next piece of work, for a thread that does `both` kinds or only demand. Waits for it; `None` when it is over.
    pub(super) fn next(&self, both: bool) -> Option<(PageRun, Urgency)> {
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

    /// Ends the work of all threads.
    pub(super) fn stop(&self) {
        self.state.lock().stop = true;
        self.filled.notify_all();
    }
}
