//! What the source gives goes through here to the sink, and is counted.

use std::ops::ControlFlow;

use page_units::PageRun;

use super::relay::{Kind, Relay, Stop};
use crate::{End, PageBytes, PageSink, Reply, SourceError, deliver_without_zeros};

impl PageSink for Relay {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        if let ControlFlow::Break(reply) = self.admit(run) {
            return reply;
        }
        if self.find_zeros {
            return deliver_without_zeros(&Counting(self), run, bytes, |run, _| Reply::Unreadable(run));
        }
        Counting(self).data(run, bytes)
    }

    fn zero(&self, run: PageRun) -> Reply {
        match self.admit(run) {
            ControlFlow::Continue(()) => Counting(self).zero(run),
            ControlFlow::Break(reply) => reply,
        }
    }

    fn absent(&self, run: PageRun) -> Reply {
        match self.admit(run) {
            ControlFlow::Continue(()) => Counting(self).absent(run),
            ControlFlow::Break(reply) => reply,
        }
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        if let ControlFlow::Break(reply) = self.admit(run) {
            return reply;
        }
        self.stop(&mut self.state.lock(), Stop::Source(error.clone()));
        self.sink.failed(run, error)
    }

    fn end(&self, end: End) {
        let mut state = self.state.lock();
        match end {
            End::Complete => state.complete = true,
            // No news after everything has come.
            End::Stopped => state.ended_early = true,
            End::Broken(error) => self.stop(&mut state, Stop::Source(error)),
        }
        self.changed.notify_all();
    }
}

/// Gives pages to the sink and counts them.
#[derive(Debug)]
struct Counting<'a>(&'a Relay);

impl PageSink for Counting<'_> {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.0.given(run, Kind::Data, self.0.sink.data(run, bytes))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.0.given(run, Kind::Zero, self.0.sink.zero(run))
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.0.given(run, Kind::Absent, self.0.sink.absent(run))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.0.sink.failed(run, error)
    }

    fn end(&self, _: End) {}
}
