//! Making sure that nobody reads what could not be had: page by page, everything that is missing, and memory that was
//! handed over for which no engine could be made.

use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use page_source::Pages;
use page_units::ByteLen;

use super::descriptor::Descriptor;
use super::{Memory, Place};
use crate::load::status::Outcome;
use crate::memory::states::State;
use crate::stats::bump;
use crate::sys::abi::Message;
use crate::sys::ops::{self, Done};
use crate::{EngineError, Region};

impl Memory {
    /// Poisons what of a range is Missing, without waiting for what is under way.
    ///
    /// A granule is InFlight until the kernel knows: whoever unregisters waits for that, or a page would be let go
    /// that only the map calls poisoned.
    pub(crate) fn poison(&self, area: usize, first: usize, granules: usize) {
        let part = &self.areas[area];
        for granule in first..first + granules {
            if !part.states.claim_missing(granule) {
                continue;
            }
            let state = if self.poison_in_kernel(area, granule) { State::Poisoned } else { State::Missing };
            let was = part.states.settle(granule, state);
            if was.requested && state == State::Poisoned {
                self.answered(part.granule.0);
            }
            if was.met {
                self.was_met();
            }
        }
    }

    /// The kernel's part of it. A page that is there already is woken, not poisoned. `false` if an event has to be read
    /// first: the granule is deferred then.
    pub(crate) fn poison_in_kernel(&self, area: usize, granule: usize) -> bool {
        let part = &self.areas[area];
        let (addr, len) = (part.addr(granule), part.len_of(1));
        loop {
            match ops::poison(self.descriptor.fd(), addr.0, len.0) {
                Done::All => bump(&self.counters.poisoned, part.granule.0),
                Done::Failed(Errno::EAGAIN) | Done::Part(_) if self.on_reader_thread() => {
                    self.retry.faults([Place { area, granule }]);
                    return false;
                }
                Done::Failed(Errno::EAGAIN) | Done::Part(_) => {
                    self.blocked();
                    continue;
                }
                Done::Failed(Errno::EEXIST | Errno::ESRCH | Errno::ENOENT) => {
                    drop(self.descriptor.wake(addr, len));
                }
                Done::Failed(errno) => {
                    log::error!("poisoning {} failed: {errno}", part.pages(granule, 1));
                    self.staging.cannot_poison.store(true, Ordering::Release);
                }
            }
            return true;
        }
    }
}

/// Where pages can't be poisoned, the descriptor is never closed: what is missing would read as zero then.
pub(crate) fn stay_open(core: &Arc<Memory>) {
    if core.staging.cannot_poison.load(Ordering::Acquire) {
        log::error!("this kernel can't poison pages: the descriptor stays open, and what is missing stays blocked");
        std::mem::forget(Arc::clone(core));
    }
}

impl Memory {
    /// Ends what could not start whole, and has no supervisor. Memory of this process is let go as it is, since its owner
    /// is told at once; for that of another process, which would go on with zeros, what is missing is poisoned.
    pub(crate) fn give_up(&self, source: &dyn Pages) {
        // Nothing is installed from here on. If it has failed before, that is so already.
        self.status.begin_completion();
        if self.descriptor.foreign() {
            self.fail_closed(source);
        } else {
            self.unregister();
        }
        self.status.end(Outcome::Failed(EngineError::Cancelled));
    }

    /// Poisons what is missing of the source's content, and then lets the memory go.
    pub(crate) fn fail_closed(&self, source: &dyn Pages) {
        for number in 0..self.areas.len() {
            let area = &self.areas[number];
            let stored = || self.poison_missing(number, area.stored(source));
            if catch_unwind(AssertUnwindSafe(stored)).is_err() {
                // Nobody knows any more what is zero.
                self.poison_missing(number, std::iter::once((0, area.states.len())));
            }
        }
        if !self.staging.cannot_poison.load(Ordering::Acquire) {
            self.unregister();
        }
        // Whoever gives memory back waits for the event to be read.
        self.read_for_want_of_handlers();
    }

    fn poison_missing(&self, number: usize, spans: impl Iterator<Item = (usize, usize)>) {
        let area = &self.areas[number];
        for (first, granules) in spans {
            let mut at = first;
            while at < first + granules {
                let run = (at..first + granules).take_while(|&granule| area.states.claim_missing(granule)).count();
                if run > 0 {
                    self.poison_range(number, at, run);
                    at += run;
                } else if matches!(area.states.get(at).state, State::InFlight | State::Missing) {
                    // Whoever is at it sees that the engine has failed, and ends soon, one way or the other.
                    std::thread::yield_now();
                } else {
                    at += 1;
                }
            }
        }
    }

    /// In as few calls as the kernel makes of it; page by page where something is in the way.
    fn poison_range(&self, number: usize, first: usize, granules: usize) {
        let area = &self.areas[number];
        let end = first + granules;
        let mut at = first;
        while at < end {
            let (addr, len) = (area.addr(at), area.len_of(end - at));
            let poisoned = match ops::poison(self.descriptor.fd(), addr.0, len.0) {
                Done::All => end - at,
                Done::Part(bytes) => usize::try_from(bytes / area.len_of(1).0).unwrap_or(0),
                Done::Failed(_) => 0,
            };
            bump(&self.counters.poisoned, poisoned as u64 * area.granule.0);
            at += poisoned;
            if poisoned == 0 {
                self.poison_in_kernel(number, at);
                at += 1;
            }
        }
        for granule in first..end {
            area.states.settle(granule, State::Poisoned);
        }
    }
}

/// A second hold on a descriptor that was handed over, while an engine is being made of it. Dropped before there is one,
/// also by a panic of the source, it poisons what is not there: nobody knows any more what of it is zero.
#[derive(Debug)]
pub(crate) struct PoisonOnAbort {
    descriptor: Arc<OwnedFd>,
    regions: Vec<Region>,
}

impl PoisonOnAbort {
    /// `None` for a descriptor made here: its memory is let go as it was.
    pub(crate) fn on(descriptor: Option<&Descriptor>, regions: &[Region]) -> Option<PoisonOnAbort> {
        let descriptor = descriptor.filter(|descriptor| descriptor.foreign())?;
        match descriptor.fd().try_clone_to_owned() {
            Ok(descriptor) => Some(PoisonOnAbort { descriptor: Arc::new(descriptor), regions: regions.to_vec() }),
            Err(error) => {
                log::warn!("a second descriptor of memory that was handed over can't be had: {error}");
                None
            }
        }
    }

    /// There is an engine, which sees to everything.
    pub(crate) fn let_go(mut self) {
        self.regions.clear();
    }

    /// Whether nothing is missing any more.
    fn poison_region(&self, region: &Region) -> bool {
        let fd = self.descriptor.as_fd();
        let (end, granule) = (region.range().end, region.backing.granule().bytes());
        let mut at = region.start;
        while at < end {
            match ops::poison(fd, at.0, (end - at).0) {
                Done::All => break,
                Done::Part(bytes) => at += ByteLen(bytes),
                Done::Failed(Errno::EEXIST) => at += granule,
                // A discard is not read yet. Faults that are read here are woken by being poisoned.
                Done::Failed(Errno::EAGAIN) => {
                    let _ = ops::read(fd, &mut [Message::default(); 16]);
                }
                // It is not registered (any more), or its owner is gone.
                Done::Failed(Errno::ENOENT | Errno::ESRCH) => break,
                Done::Failed(errno) => {
                    log::error!("poisoning {} failed: {errno}", region.run);
                    return false;
                }
            }
        }
        true
    }
}

impl Drop for PoisonOnAbort {
    fn drop(&mut self) {
        if !self.regions.iter().all(|region| self.poison_region(region)) {
            log::error!(
                "memory that was handed over can't be poisoned: its descriptor stays open, and what is missing blocked"
            );
            std::mem::forget(Arc::clone(&self.descriptor));
        }
    }
}
