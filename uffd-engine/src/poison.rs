//! Making sure that nobody reads what could not be had.

use std::sync::atomic::Ordering;

use nix::errno::Errno;

use crate::core::{Core, Place};
use crate::state::State;
use crate::stats::bump;
use crate::sys::ops::{self, Done};

impl Core {
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
                    self.deferred.faults([Place { area, granule }]);
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
