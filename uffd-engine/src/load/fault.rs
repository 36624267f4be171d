//! Serving one page fault.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use page_source::{PageSource, Pages, SharedFeed, SourceError, Urgency};
use page_units::{ByteLen, HostAddr, PageCount, PageRun};

use crate::EngineError;
use crate::load::install::{Content, frozen};
use crate::load::status::{Status, Task};
use crate::memory::gate::Gate;
use crate::memory::states::State;
use crate::memory::{Memory, Place};
use crate::pause::PausePoint;
use crate::stats::bump;
use crate::sys::abi::{UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP};
use crate::sys::ops::{self, Done};

/// Where content comes from, as a handler sees it.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) pages: Arc<dyn Pages>,
    /// The source, if it may be started again.
    pub(crate) again: Option<Arc<dyn PageSource>>,
    pub(crate) feed: SharedFeed,
    /// The supervisor waits until nobody is asking, in order to finish the flow.
    pub(crate) wanted: AtomicBool,
    /// So many pages are asked for at a time, around the fault.
    pub(crate) around: PageCount,
}

impl Origin {
    /// Asks the source.
    pub(crate) fn request(&self, status: &Status, run: PageRun, urgency: Urgency) {
        if self.feed.request(run, urgency).is_none() {
            let error = SourceError::stopped(format_args!("{run} is needed, after everything had come"));
            status.fail(EngineError::Broken(error));
        }
        if self.wanted.load(Ordering::SeqCst) {
            status.tell(Task::Check);
        }
    }

    /// Ends the flow: is what was delivered still true? `None` if somebody is asking for pages just now, who has it all
    /// checked again.
    pub(crate) fn finish(&self, status: &Status) -> Option<Result<(), SourceError>> {
        status.finishing_source();
        self.wanted.store(true, Ordering::SeqCst);
        self.feed.try_finish()
    }
}

/// Zeros are installed in ranges of up to so many 4 KiB pages around a fault: one costs little more than the other.
const ZERO_AROUND: usize = 16;

impl Memory {
    /// A fault that a handler has read at `since`.
    pub(crate) fn fault(&self, origin: &Origin, addr: HostAddr, flags: u64, since: Instant) {
        self.pauses.at(PausePoint::FaultRead);
        if flags & UFFD_PAGEFAULT_FLAG_WP != 0 {
            return self.write_fault(addr);
        }
        if self.counters.fault(since) {
            self.status.tell(Task::FirstFault);
        }
        let Some(place) = self.locate(addr) else {
            return self.status.fail(EngineError::StrayFault(addr));
        };
        if self.serve(origin, place, flags & UFFD_PAGEFAULT_FLAG_MINOR != 0, false) {
            self.counters.resolved(since);
        } else {
            self.latencies.insert(place, since);
            let state = self.areas[place.area].states.get(place.granule).state;
            if state == State::Present
                && let Some(since) = self.latencies.remove(place)
            {
                self.counters.resolved(since);
            }
        }
    }

    /// A write to a page of frozen memory, or to one whose protection nobody needs any more.
    fn write_fault(&self, addr: HostAddr) {
        match self.locate(addr) {
            Some(place) => self.serve_write(place),
            None => self.status.fail(EngineError::StrayFault(addr)),
        }
    }

    fn serve_write(&self, place: Place) {
        let area = &self.areas[place.area];
        let gate = self.installing();
        let done = match frozen(&gate) {
            Some(shared) => shared.write(place),
            None => {
                let (addr, len) = (area.addr(place.granule), area.len_of(1));
                // Any other error: it is being unregistered, and its writer woken.
                ops::write_protect(self.descriptor.fd(), addr.0, len.0, false) != Err(Errno::EAGAIN)
            }
        };
        if !done {
            self.retry.write(place);
        }
    }

    /// Serves the faults again that could not be served before an event was read. Answers whether some are left.
    pub(crate) fn serve_deferred(&self, origin: &Origin) -> bool {
        let (faults, writes) = self.retry.take();
        for place in faults {
            self.serve(origin, place, false, true);
        }
        for place in writes {
            self.serve_write(place);
        }
        self.retry.some()
    }

    /// Brings what a fault needs. `true` if whoever waited goes on already.
    fn serve(&self, origin: &Origin, place: Place, minor: bool, again: bool) -> bool {
        let area = &self.areas[place.area];
        // A granule whose pages are being gathered in the file is as good as missing until they are all there.
        let gathering = || area.region.alias.is_some() && self.staging.gathering(place);
        if minor && !(area.states.get(place.granule).state == State::Missing && gathering()) {
            return self.serve_cached(origin, place);
        }
        loop {
            let entry = area.states.get_to_change(place.granule);
            return match entry.state {
                // Whoever installs it wakes its waiters, ours among them.
                State::InFlight if area.states.meet(place.granule) => true,
                State::InFlight => continue,
                // A fault on a page that is there is real: what was installed may have been dropped by a discard that
                // was read before. If it is there after all, the kernel says so, and it is woken.
                State::Present => self.serve_lost(place),
                State::Zero | State::Removed => {
                    bump(&self.counters.demand_zero_faults, 1);
                    self.serve_zeros(origin, place)
                }
                State::Poisoned => {
                    self.poison_in_kernel(place.area, place.granule);
                    true
                }
                // The supervisor is poisoning it, and wakes it.
                State::Missing if self.status.failing() => true,
                State::Missing if self.is_zero(origin, place) => {
                    self.mark_zero(place);
                    continue;
                }
                State::Missing => {
                    if entry.wanted && entry.requested && !again {
                        return false;
                    }
                    let Some(before) = area.states.request(place.granule, true) else { continue };
                    if !before {
                        self.window.requested(area.granule.0);
                    }
                    self.recent_faults.push(place);
                    origin.request(&self.status, self.around(origin, place), Urgency::Demand);
                    area.states.get(place.granule).state == State::Present
                }
            };
        }
    }

    /// The source knows that it is zero: it need not come any more.
    fn mark_zero(&self, place: Place) {
        let area = &self.areas[place.area];
        let was = area.states.mark_zero(place.granule);
        // (If it is not Missing any more, whoever was faster answers.)
        if was.state == State::Missing && was.requested {
            self.answered(area.granule.0);
        }
    }

    fn is_zero(&self, origin: &Origin, place: Place) -> bool {
        let area = &self.areas[place.area];
        let span = origin.pages.content(area.pages(place.granule, 1));
        span.content == page_source::Content::Zero && span.pages >= area.granule
    }

    /// The pages to ask for: the granule, and what is Missing right around it in the same aligned window.
    fn around(&self, origin: &Origin, place: Place) -> PageRun {
        let area = &self.areas[place.area];
        let window = ByteLen(origin.around.0).get();
        if window <= 1 || !area.small() {
            return area.pages(place.granule, 1);
        }
        let start = place.granule - place.granule % window;
        let end = (start + window).min(area.states.len());
        let missing = |granule: &usize| {
            let asked = area.states.request(*granule, false);
            if asked == Some(false) {
                self.window.requested(area.granule.0);
            }
            asked == Some(false)
        };
        let before = (start..place.granule).rev().take_while(missing).count();
        let after = (place.granule + 1..end).take_while(missing).count();
        area.pages(place.granule - before, before + 1 + after)
    }

    /// Zeros for a granule, and for what is zero right around it.
    fn serve_zeros(&self, origin: &Origin, place: Place) -> bool {
        let area = &self.areas[place.area];
        let (mut start, mut end) = (place.granule, place.granule + 1);
        if area.small() {
            let window = place.granule - place.granule % ZERO_AROUND;
            let known = |granule: &usize| self.known_zero(origin, Place { granule: *granule, ..place });
            start -= (window..start).rev().take_while(known).count();
            end += (end..(window + ZERO_AROUND).min(area.states.len())).take_while(known).count();
        }
        // From here on nobody else is asked: who has claimed must not be held up, nor die.
        let gate = self.installing();
        let claim = |granule: &usize| area.states.claim_zero(*granule);
        if !claim(&place.granule) {
            return true;
        }
        let before = (start..place.granule).rev().take_while(claim).count();
        let claimed = before + 1 + (place.granule + 1..end).take_while(claim).count();
        let first = place.granule - before;
        let done = self.install_zeros(&gate, Place { granule: first, ..place }, claimed);
        drop(gate);
        matches!(done, Ok(n) if n == claimed)
    }

    /// Whether a page is known to be zero, by the map or by the source.
    fn known_zero(&self, origin: &Origin, place: Place) -> bool {
        let states = &self.areas[place.area].states;
        match states.get(place.granule).state {
            State::Zero => true,
            State::Missing if self.is_zero(origin, place) => {
                self.mark_zero(place);
                true
            }
            _ => false,
        }
    }

    /// A page that the map says is there. Zeros, unless the kernel has something.
    fn serve_lost(&self, place: Place) -> bool {
        let area = &self.areas[place.area];
        let (addr, len) = (area.addr(place.granule), area.len_of(1));
        match self.zero(&self.installing(), place, 1) {
            Done::All => bump(&self.counters.zero_installed, area.granule.0),
            Done::Failed(Errno::EAGAIN) | Done::Part(_) => {
                self.retry.faults([place]);
                return false;
            }
            // It is there, or the region is being unregistered: nobody has to wait.
            Done::Failed(_) => drop(self.descriptor.wake(addr, len)),
        }
        true
    }

    /// A minor fault: the file behind the memory holds the page, and it only has to be mapped.
    fn serve_cached(&self, origin: &Origin, place: Place) -> bool {
        bump(&self.counters.minor_faults, 1);
        let area = &self.areas[place.area];
        let states = &area.states;
        loop {
            let state = states.get(place.granule).state;
            let gate = self.installing();
            match state {
                State::InFlight if states.meet(place.granule) => return true,
                State::Missing | State::Zero | State::Removed => {
                    let done = self.map_cached(&gate, place);
                    drop(gate);
                    match done {
                        // It was cut off the file since the fault was read, or is being put together there.
                        Some(false) => return self.serve(origin, place, false, false),
                        Some(true) => return true,
                        None => {}
                    }
                }
                State::InFlight => {}
                State::Poisoned => {
                    drop(gate);
                    self.poison_in_kernel(place.area, place.granule);
                    return true;
                }
                State::Present => {
                    let (addr, len) = (area.addr(place.granule), area.len_of(1));
                    let protect = frozen(&gate).is_some_and(|shared| shared.protects(place, 1));
                    let done = ops::map_cached(self.descriptor.fd(), addr.0, len.0, protect);
                    if matches!(done, Done::Failed(Errno::EAGAIN)) {
                        self.retry.faults([place]);
                        return false;
                    }
                    if done != Done::All {
                        drop(self.descriptor.wake(addr, len));
                    }
                    return true;
                }
            }
        }
    }

    /// Maps what the file behind the memory holds of a granule: `false` if it holds nothing, or only a part so far;
    /// `None` if somebody else is at it.
    pub(crate) fn map_cached(&self, gate: &Gate<'_>, place: Place) -> Option<bool> {
        let states = &self.areas[place.area].states;
        let claim = || states.claim(place.granule) || states.claim_zero(place.granule);
        match self.staging.unless_gathering(place, claim) {
            None => return Some(false),
            Some(false) => return None,
            Some(true) => {}
        }
        Some(self.install(gate, place, 1, Content::Cached).is_ok_and(|done| done == 1))
    }
}
