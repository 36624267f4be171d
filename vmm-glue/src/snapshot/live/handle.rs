//! A snapshot that is being written while the guest runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use page_source::{Feed, SinkError};
use page_units::{ByteLen, PageCount};
use uffd_engine::{FreezeHandle, FreezeStats, FrozenError};

use super::sink::LiveSink;
use super::{Blackout, LiveError};
use crate::GuestRam;
use crate::machine::FOR_EVER;

/// How far a live snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveProgress {
    /// Pages that are written, or known to be zero.
    pub saved: PageCount,
    /// All of them.
    pub total: PageCount,
}

/// What a live snapshot did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LiveReport {
    /// How long no vCPU ran, and why.
    pub blackout: Blackout,
    /// Write faults and pages.
    pub stats: FreezeStats,
    /// Pages with content in the file.
    pub stored: PageCount,
    /// How long the device state is.
    pub state: ByteLen,
    /// From the call until the file was durable and had its name.
    pub took: Duration,
}

/// What was known when the guest went on.
#[derive(Debug)]
pub(super) struct Begun {
    pub(super) begun: Instant,
    pub(super) blackout: Blackout,
    pub(super) state: ByteLen,
}

/// A snapshot that is being written while the guest runs.
///
/// # Dropping
/// Dropping it cancels it, and waits until the thread that saves has ended: a write to a slow disk is waited for. The
/// guest does not stand still meanwhile.
#[derive(Debug)]
pub struct LiveSnapshot {
    // In this order: no thread delivers any more and the memory is let go, and only then may it be unmapped.
    _feed: Box<dyn Feed>,
    frozen: FreezeHandle,
    sink: Arc<LiveSink>,
    ram: Arc<GuestRam>,
    begun: Begun,
}

impl LiveSnapshot {
    pub(super) fn new(
        feed: Box<dyn Feed>,
        frozen: FreezeHandle,
        sink: Arc<LiveSink>,
        ram: Arc<GuestRam>,
        begun: Begun,
    ) -> LiveSnapshot {
        LiveSnapshot { _feed: feed, frozen, sink, ram, begun }
    }

    /// How long no vCPU ran, and why.
    #[must_use]
    pub fn blackout(&self) -> Blackout {
        self.begun.blackout
    }

    /// How far it is. When all pages are saved the file still has to be made durable.
    #[must_use]
    pub fn progress(&self) -> LiveProgress {
        let stats = self.stats();
        LiveProgress { saved: PageCount(stats.pages + stats.zero_pages), total: self.ram.layout().total().to_pages() }
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> FreezeStats {
        self.frozen.stats()
    }

    /// Gives the snapshot up: the guest's memory is let go at once. Returns before the file is gone;
    /// [`wait`](LiveSnapshot::wait) waits for that. A snapshot that is about to be published may be published still.
    pub fn cancel(&self) {
        self.frozen.cancel();
    }

    /// Waits until it is over, one way or the other, for a limited time; `false` if it is not.
    #[must_use]
    pub fn wait_for(&self, limit: Duration) -> bool {
        self.sink.wait(Some(Instant::now() + limit.min(FOR_EVER))).is_some()
    }

    /// Waits until the file is complete, durable and under its name.
    ///
    /// # Errors
    /// If there is no file (or the one that was there before): it was cancelled, or something failed. The guest goes
    /// on all the same.
    pub fn wait(self) -> Result<LiveReport, LiveError> {
        match self.sink.wait(None) {
            Some(Ok(stored)) => Ok(LiveReport {
                blackout: self.begun.blackout,
                stats: self.stats(),
                stored,
                state: self.begun.state,
                took: self.begun.begun.elapsed(),
            }),
            Some(Err(error)) => Err(self.reason(error)),
            None => Err(LiveError::Died),
        }
    }

    /// The sink knows only that something is missing; the memory knows why.
    fn reason(&self, error: SinkError) -> LiveError {
        match self.frozen.wait() {
            Ok(_) => LiveError::Write(error),
            Err(FrozenError::Sink(error)) => LiveError::Write(error),
            Err(FrozenError::Cancelled) => LiveError::Cancelled,
            Err(FrozenError::Died) => LiveError::Died,
            Err(other) => LiveError::Frozen(other),
        }
    }
}
