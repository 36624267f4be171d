//! Ctrl-C and its like, asked for where they matter instead of coming in between.

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::commands::Failure;

/// The signals that ask a program to end, held back.
#[derive(Debug)]
pub(super) struct Interrupts {
    pending: SignalFd,
}

impl Interrupts {
    /// Holds them back, in this thread and in those it starts.
    pub(super) fn catch() -> Result<Interrupts, Failure> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        let failed = |error| format!("signals can't be held back: {error}");
        set.thread_block().map_err(failed)?;
        // A file that may not grow is an error of the write then, and not our death.
        SigSet::from(Signal::SIGXFSZ).thread_block().map_err(failed)?;
        let pending = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(failed)?;
        Ok(Interrupts { pending })
    }

    /// Whether one has come since it was asked last.
    pub(super) fn came(&self) -> bool {
        matches!(self.pending.read_signal(), Ok(Some(_)))
    }
}
