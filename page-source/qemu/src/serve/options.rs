//! How to serve, and what came of it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use page_units::{ByteLen, PageCount};

/// How to serve.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Push what nobody asked for (default: yes). Without, only [`Control::drain`] brings the end.
    pub background: bool,
    /// Answer requests on a connection of their own. The destination must have been told so (capability
    /// `postcopy-preempt`).
    pub preempt: bool,
    /// How much of the background may lie between us and the destination, where, without
    /// [`preempt`](Options::preempt), a request has to wait behind it (default: 256 KiB). After a request it is a quarter of that for 10 ms, since who
    /// has asked asks again.
    pub window: ByteLen,
    /// How long the destination may be silent where it has nothing to do but answer (default: 60 s): while it is
    /// connected to, while it loads its devices and waits for no page, and when it was told that it has everything.
    /// What moves counts, however slowly. A guest that runs may be silent, and even take nothing, for as long as it
    /// likes; over TCP its system has to answer, and to take something, once a minute.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options { background: true, preempt: false, window: ByteLen(256 << 10), patience: Duration::from_secs(60) }
    }
}

/// How far a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Not connected, or the connection is being set up.
    Opening,
    /// The destination loads its devices.
    Loading,
    /// The guest runs already, and the destination has not said yet which pages it has.
    Resuming,
    /// The devices are loaded and the guest is started (unless it is to stay paused).
    Started,
    /// Everything was sent.
    Finishing,
}

/// Numbers of a server at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// How far it is.
    pub phase: Phase,
    /// Pages that the destination asked for, as often as it did.
    pub requested: PageCount,
    /// Pages with content that were sent because they were asked for.
    pub demand: PageCount,
    /// Pages with content that were sent in the background.
    pub background: PageCount,
    /// Zero pages that were sent: only those that were asked for (or share a huge page with content).
    pub zero: PageCount,
    /// Pages that the destination had already, when resumed.
    pub received_before: PageCount,
}

/// What a server did, when all is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The final numbers.
    pub progress: Progress,
    /// Bytes sent, all channels together.
    pub sent: ByteLen,
    /// From the call until the devices were loaded; `None` when resumed.
    pub to_started: Option<Duration>,
    /// From the call until the destination said that it has everything.
    pub to_complete: Duration,
}

/// A handle on a server at work, for other threads.
#[derive(Clone, Debug)]
pub struct Control {
    pub(super) shared: Arc<Shared>,
}

impl Control {
    pub(super) fn new() -> io::Result<Control> {
        let event = || EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let shared = Shared {
            session: Bell { event: event()?, waiting: AtomicBool::new(true) },
            pusher: Bell { event: event()?, waiting: AtomicBool::new(true) },
            drain: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            commitment: AtomicU8::new(OPEN),
            counters: Counters::default(),
        };
        Ok(Control { shared: Arc::new(shared) })
    }

    /// Sends the rest even if the background was switched off, then ends.
    pub fn drain(&self) {
        self.shared.drain.store(true, Ordering::Release);
        self.shared.pusher.ring();
    }

    /// Ends, unless the destination has, or is about to have, what starts the guest; whether it ends. For a resumed guest
    /// only before it is resumed.
    #[must_use]
    pub fn cancel(&self) -> bool {
        let cancelled = self.shared.decide(CANCELLED);
        if cancelled {
            self.stop();
        }
        cancelled
    }

    /// Ends at once. If the guest had been started it waits for its missing pages until another server resumes.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.session.ring();
        self.shared.pusher.ring();
    }

    /// Whether it was ended with [`stop`](Self::stop) or [`cancel`](Self::cancel).
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.shared.is_stopped()
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.counters.progress()
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) session: Bell,
    pub(super) pusher: Bell,
    pub(super) drain: AtomicBool,
    pub(super) stop: AtomicBool,
    /// Decided once.
    commitment: AtomicU8,
    pub(super) counters: Counters,
}

/// Whether the guest is started: not decided yet, yes, no.
const OPEN: u8 = 0;
const COMMITTED: u8 = 1;
const CANCELLED: u8 = 2;

impl Shared {
    /// The destination is about to get what starts the guest, unless that was cancelled.
    pub(super) fn commit(&self) -> bool {
        self.decide(COMMITTED)
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn decide(&self, how: u8) -> bool {
        match self.commitment.compare_exchange(OPEN, how, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(before) => before == how,
        }
    }
}

/// Wakes a thread out of `poll`, at the cost of a system call only if it waits.
#[derive(Debug)]
pub(super) struct Bell {
    event: EventFd,
    waiting: AtomicBool,
}

impl Bell {
    pub(super) fn ring(&self) {
        if self.waiting.swap(false, Ordering::SeqCst) {
            // Fails only if the counter overflows: then it is readable, which is what is wanted.
            let _ = self.event.write(1);
        }
    }

    /// The owner is about to wait: whatever it has looked at before may have changed, and must be looked at again.
    pub(super) fn listen(&self) {
        self.waiting.store(true, Ordering::SeqCst);
    }

    /// The owner has waited.
    pub(super) fn hush(&self) {
        // A thread that has rung may come to write only after this: that is read the next time, rung or not, or else each wait
        // from then on would end at once. Nothing to read is all right.
        self.waiting.store(false, Ordering::SeqCst);
        let _ = self.event.read();
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) phase: AtomicU8,
    pub(super) requested: AtomicU64,
    pub(super) demand: AtomicU64,
    pub(super) background: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) received_before: AtomicU64,
}

impl Counters {
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    pub(super) fn phase(&self) -> Phase {
        let phases = [Phase::Opening, Phase::Loading, Phase::Resuming, Phase::Started, Phase::Finishing];
        phases.get(usize::from(self.phase.load(Ordering::Acquire))).copied().unwrap_or(Phase::Finishing)
    }

    fn progress(&self) -> Progress {
        let pages = |counter: &AtomicU64| PageCount(counter.load(Ordering::Relaxed));
        Progress {
            phase: self.phase(),
            requested: pages(&self.requested),
            demand: pages(&self.demand),
            background: pages(&self.background),
            zero: pages(&self.zero),
            received_before: pages(&self.received_before),
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    /// Between the two things that `ring` does its thread may be held up until the owner has looked and listens again.
    #[test]
    fn a_bell_that_was_rung_late_does_not_go_on_ringing() {
        let control = Control::new().unwrap();
        let bell = &control.shared.pusher;
        let is_loud = || poll(&mut [PollFd::new(bell.fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() > 0;
        bell.listen();
        assert!(bell.waiting.swap(false, Ordering::SeqCst));
        bell.hush();
        bell.listen();
        bell.event.write(1).unwrap();
        assert!(is_loud());
        bell.hush();
        for _ in 0..2 {
            bell.listen();
            assert!(!is_loud());
            bell.ring();
            assert!(is_loud());
            bell.hush();
        }
    }
}
