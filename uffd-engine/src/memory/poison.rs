//! Making sure that nobody reads unavailable pages: page by page, everything that is missing, and memory that was
//! handed over for which no engine could be made.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use page_units::ByteLen;

use super::descriptor::Descriptor;
use super::memory::Memory;
use super::place::Place;
use super::region::Region;
use super::states::State;
use crate::stats::bump;
use crate::sys::abi::{Features, Message};
use crate::sys::memory;
use crate::sys::ops::{self, Done};

impl Memory {
    /// Whether pages had to be poisoned that the kernel can't poison.
    pub(crate) fn cannot_poison(&self) -> bool {
        self.cannot_poison.load(Ordering::Acquire)
    }

    /// Poisons a granule in the kernel. A page that is there already is woken, not poisoned. `false` if an event has to be
    /// read first, and this thread is one that reads them: the granule is served again then. Elsewhere `blocked` is
    /// called, which lets the readers run.
    pub(crate) fn poison_in_kernel(&self, at: Place, blocked: impl Fn()) -> bool {
        let area = self.area(at.area);
        let (addr, len) = (area.addr(at.granule), area.len_of(1));
        loop {
            match ops::poison(self.view.descriptor.fd(), addr.0, len.0) {
                Done::All => bump(&self.counters.poisoned, area.granule.0),
                Done::Failed(Errno::EAGAIN) | Done::Part(_) if self.view.on_reader_thread() => {
                    self.view.retry.faults([at]);
                    return false;
                }
                Done::Failed(Errno::EAGAIN) | Done::Part(_) => {
                    blocked();
                    continue;
                }
                Done::Failed(Errno::EEXIST | Errno::ESRCH | Errno::ENOENT) => self.wake(at, 1),
                Done::Failed(errno) => {
                    if self.refuse_access(at, 1) {
                        return true;
                    }
                    log::error!("poisoning {} failed: {errno}", area.pages(at.granule, 1));
                    self.cannot_poison.store(true, Ordering::Release);
                }
            }
            return true;
        }
    }

    /// Poisons the parts of some spans that are Missing, and waits for what is being installed. No install begins any more.
    pub(crate) fn poison_missing(
        &self,
        number: usize,
        spans: impl Iterator<Item = (usize, usize)>,
        blocked: impl Fn() + Copy,
    ) {
        let states = self.states(number);
        for (first, granules) in spans {
            let mut at = first;
            while at < first + granules {
                let run = (at..first + granules).take_while(|&granule| states.claim_missing(granule)).count();
                if run > 0 {
                    self.poison_range(number, at, run, blocked);
                    at += run;
                } else if matches!(states.get(at).state, State::InFlight | State::Missing) {
                    // The installer sees that the engine has failed, and ends soon, one way or the other.
                    std::thread::yield_now();
                } else {
                    at += 1;
                }
            }
        }
    }

    /// In as few calls as the kernel makes of it; page by page where something is in the way.
    fn poison_range(&self, number: usize, first: usize, granules: usize, blocked: impl Fn() + Copy) {
        let area = self.area(number);
        let end = first + granules;
        let mut at = first;
        while at < end {
            let (addr, len) = (area.addr(at), area.len_of(end - at));
            let whole = Place { area: number, granule: at };
            if !self.view.descriptor.kernel().contains(Features::POISON) && self.refuse_access(whole, end - at) {
                break;
            }
            let poisoned = match ops::poison(self.view.descriptor.fd(), addr.0, len.0) {
                Done::All => end - at,
                Done::Part(bytes) => usize::try_from(bytes / area.len_of(1).0).unwrap_or(0),
                // The process is gone, and its memory with it: nobody reads what is left.
                Done::Failed(Errno::ESRCH) => break,
                Done::Failed(_) => 0,
            };
            bump(&self.counters.poisoned, poisoned as u64 * area.granule.0);
            at += poisoned;
            if poisoned == 0 {
                self.poison_in_kernel(Place { area: number, granule: at }, blocked);
                at += 1;
            }
        }
        for granule in first..end {
            self.states(number).settle(granule, State::Poisoned);
        }
    }

    /// Where pages can't be poisoned, the descriptor is never closed: what is missing would read as zero then.
    pub(crate) fn stay_open(self: &Arc<Memory>) {
        if self.cannot_poison() {
            log::error!("this kernel can't poison pages: the descriptor stays open, and what is missing stays blocked");
            std::mem::forget(Arc::clone(self));
        }
    }
}

impl Memory {
    /// The same without `UFFDIO_POISON` (before Linux 6.6), for memory of this process: nobody has any right to these
    /// granules, of which nothing is there, and who waits for them is told. Where the kernel can't have a mapping more
    /// (`vm.max_map_count`), nobody has any right to the area.
    fn refuse_access(&self, at: Place, granules: usize) -> bool {
        if self.view.descriptor.foreign() {
            return false;
        }
        let area = self.area(at.area);
        if !ops::is_registered(self.view.descriptor.fd(), area.addr(at.granule).0, area.len_of(granules).0) {
            // It begins in one mapping and ends in another; or it was mapped over, and is somebody else's.
            let half = granules / 2;
            return half == 0 || {
                let rest = Place { granule: at.granule + half, ..at };
                self.refuse_access(at, half) & self.refuse_access(rest, granules - half)
            };
        }
        let done = memory::refuse_access(area.addr(at.granule), area.len_of(granules)).or_else(|errno| match errno {
            Errno::ENOMEM => memory::refuse_access(area.region.start, area.region.len()),
            errno => Err(errno),
        });
        if let Err(errno) = done {
            log::error!("taking the rights to {} failed: {errno}", area.pages(at.granule, granules));
            return false;
        }
        // One that was refused before is met again by a fault that was read before.
        let here = at.granule..at.granule + granules;
        let new = here.filter(|&granule| self.states(at.area).get(granule).state != State::Poisoned).count();
        bump(&self.counters.poisoned, new as u64 * area.granule.0);
        self.wake(at, granules);
        true
    }
}

/// A second hold on a descriptor that was handed over, while an engine is being made of it. Dropped before there is one,
/// also by a panic of the source, it poisons what is not there: nobody knows any more which pages are zero.
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
                log::warn!("a second descriptor of memory that was handed over is unavailable: {error}");
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
