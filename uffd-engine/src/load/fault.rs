//! Serving one page fault.

use std::sync::Arc;

use nix::errno::Errno;
use page_source::Urgency;
use page_units::{ByteLen, PageRun};

use super::install::Content;
use super::load::Load;
use super::status::Task;
use crate::EngineError;
use crate::memory::backing::Backing;
use crate::memory::gate::holder;
use crate::memory::states::{State, StateMap};
use crate::memory::{Area, Memory, Place};
use crate::pause::PausePoint;
use crate::serve::served::{Discarded, Fault, Served};
use crate::stats::bump;
use crate::sys::ops::{self, Done};

/// Zeros are installed in ranges of up to this many 4 KiB pages around a fault: one costs little more than the other.
const ZERO_AROUND: usize = 16;

impl Discarded for Load {
    fn discarded(&self, at: Place, requested: bool) {
        self.intake.discarded(at, requested);
    }
}

impl Served for Load {
    fn memory(&self) -> &Arc<Memory> {
        &self.intake.memory
    }

    fn fault(&self, fault: Fault) {
        let memory = &self.intake.memory;
        memory.pauses.at(PausePoint::FaultRead);
        if memory.counters.fault(fault.since) {
            self.intake.status.tell(Task::FirstFault);
        }
        let Some(place) = memory.view.locate(fault.addr) else {
            return self.fail(EngineError::StrayFault(fault.addr));
        };
        if self.serve(place, fault.minor, false) {
            return memory.counters.resolved(fault.since);
        }
        if self.intake.latencies.insert(place, fault.since) {
            self.intake.status.tell(Task::Waits);
        }
        if self.states(place).get(place.granule).state == State::Present
            && let Some(since) = self.intake.latencies.remove(place)
        {
            memory.counters.resolved(since);
        }
    }

    fn fault_again(&self, at: Place) {
        self.serve(at, false, true);
    }

    fn fail(&self, error: EngineError) {
        self.intake.status.fail(error);
    }
}

impl Load {
    fn area(&self, place: Place) -> &Area {
        self.intake.memory.area(place.area)
    }

    fn states(&self, place: Place) -> &StateMap {
        self.intake.memory.states(place.area)
    }

    /// Brings what a fault needs. `true` if its waiters go on already.
    fn serve(&self, place: Place, minor: bool, again: bool) -> bool {
        let (area, states) = (self.area(place), self.states(place));
        // A granule whose pages are being gathered in the file is as good as missing until they are all there.
        let gathering = || area.region.alias.is_some() && self.intake.staging.gathering(place);
        if minor && !(states.get(place.granule).state == State::Missing && gathering()) {
            return self.serve_cached(place);
        }
        loop {
            let entry = states.get_to_change(place.granule);
            return match entry.state {
                // The installer wakes its waiters, ours among them.
                State::InFlight if states.meet(place.granule) => true,
                State::InFlight => continue,
                // A fault on a page that is there is real: what was installed may have been dropped by a discard that
                // was read before. If it is there after all, the kernel says so, and it is woken.
                State::Present => self.serve_lost(place),
                State::Zero | State::Removed => {
                    bump(&self.intake.memory.counters.demand_zero_faults, 1);
                    self.serve_zeros(place)
                }
                State::Poisoned => {
                    self.intake.memory.poison_in_kernel(place, || self.intake.blocked());
                    true
                }
                // The supervisor is poisoning it, and wakes it.
                State::Missing if self.intake.status.failing() => true,
                State::Missing if self.mark_zeros(place) => continue,
                State::Missing => {
                    if entry.wanted && entry.requested && !again {
                        return false;
                    }
                    let Some(before) = states.request(place.granule, true) else { continue };
                    if !before {
                        self.intake.window.requested(area.granule.0);
                    }
                    self.intake.recent_faults.push(place);
                    self.ask(self.around(place), Urgency::Demand);
                    states.get(place.granule).state == State::Present
                }
            };
        }
    }

    /// The source knows that it is zero: it need not come any more.
    fn mark_zero(&self, place: Place) {
        let area = self.area(place);
        let was = self.states(place).mark_zero(place.granule);
        // (If it is not Missing any more, the faster thread answers.)
        if was.state == State::Missing && was.requested {
            self.intake.answered(area.granule.0);
        }
    }

    /// Notes what the source knows to be zero, from the granule to the end of its window. `false` if the granule itself is
    /// not known to be.
    fn mark_zeros(&self, place: Place) -> bool {
        let area = self.area(place);
        let most = if area.small() { ZERO_AROUND - place.granule % ZERO_AROUND } else { 1 };
        let span = self.pages.content(area.pages(place.granule, most.min(area.granules - place.granule)));
        let zeros = match span.content {
            page_source::Content::Zero => ByteLen(span.pages.0 / area.granule.0).get(),
            _ => 0,
        };
        (0..zeros.min(most)).for_each(|next| self.mark_zero(Place { granule: place.granule + next, ..place }));
        zeros > 0
    }

    /// The pages to ask for: the granule, and what is Missing right around it in the same aligned window.
    fn around(&self, place: Place) -> PageRun {
        let area = self.area(place);
        let window = ByteLen(self.around.0).get();
        if window <= 1 || !area.small() {
            return area.pages(place.granule, 1);
        }
        let start = place.granule - place.granule % window;
        let end = (start + window).min(self.states(place).len());
        let missing = |granule: &usize| {
            let asked = self.states(place).request(*granule, false);
            if asked == Some(false) {
                self.intake.window.requested(area.granule.0);
            }
            asked == Some(false)
        };
        let before = (start..place.granule).rev().take_while(missing).count();
        let after = (place.granule + 1..end).take_while(missing).count();
        area.pages(place.granule - before, before + 1 + after)
    }

    /// Zeros for a granule, and for what is zero right around it.
    fn serve_zeros(&self, place: Place) -> bool {
        let area = self.area(place);
        let (mut start, mut end) = (place.granule, place.granule + 1);
        if area.small() {
            let window = place.granule - place.granule % ZERO_AROUND;
            let known = |granule: &usize| self.states(place).get(*granule).state == State::Zero;
            start -= (window..start).rev().take_while(known).count();
            end += (end..(window + ZERO_AROUND).min(self.states(place).len())).take_while(known).count();
        }
        // From here on nobody else is asked: who has claimed must not be held up, nor die.
        let gate = self.intake.memory.view.installing();
        let claim = |granule: &usize| self.states(place).claim_zero(*granule);
        if !claim(&place.granule) {
            return true;
        }
        let before = (start..place.granule).rev().take_while(claim).count();
        let claimed = before + 1 + (place.granule + 1..end).take_while(claim).count();
        let first = place.granule - before;
        let done = self.intake.install(&gate, Place { granule: first, ..place }, claimed, Content::Zeros);
        drop(gate);
        matches!(done, Ok(n) if n == claimed)
    }

    /// A page that the map says is there. Zeros, unless the kernel has something.
    fn serve_lost(&self, place: Place) -> bool {
        let area = self.area(place);
        match self.intake.zero(&self.intake.memory.view.installing(), place, 1) {
            Done::All => bump(&self.intake.memory.counters.zero_installed, area.granule.0),
            Done::Failed(Errno::EAGAIN) | Done::Part(_) => {
                self.intake.memory.view.retry.faults([place]);
                return false;
            }
            Done::Failed(Errno::EEXIST | Errno::ENOMEM)
                if area.region.backing == Backing::Hugetlb
                    && self.intake.memory.view.is_mapped(area, place.granule) == Some(false) =>
            {
                let _ = self.intake.no_huge_page(area, place);
            }
            // It is there, or the region is being unregistered: nobody has to wait.
            Done::Failed(_) => self.intake.memory.wake(place, 1),
        }
        true
    }

    /// A minor fault: the file behind the memory holds the page, and it only has to be mapped.
    fn serve_cached(&self, place: Place) -> bool {
        bump(&self.intake.memory.counters.minor_faults, 1);
        let area = self.area(place);
        let states = self.states(place);
        loop {
            let state = states.get(place.granule).state;
            let gate = self.intake.memory.view.installing();
            match state {
                State::InFlight if states.meet(place.granule) => return true,
                // Not put there by us, and taken for content by nobody: see what the kernel says to ours.
                State::Missing if !self.intake.prefilled => {
                    drop(gate);
                    return self.serve(place, false, false);
                }
                State::Missing | State::Zero | State::Removed => {
                    let done = self.intake.map_cached(&gate, place);
                    drop(gate);
                    match done {
                        // It was cut off the file since the fault was read, or is being put together there.
                        Some(false) => return self.serve(place, false, false),
                        Some(true) => return true,
                        None => {}
                    }
                }
                State::InFlight => {}
                State::Poisoned => {
                    drop(gate);
                    self.intake.memory.poison_in_kernel(place, || self.intake.blocked());
                    return true;
                }
                State::Present => {
                    let (addr, len) = (area.addr(place.granule), area.len_of(1));
                    let protect = holder(&gate).is_some_and(|holder| holder.protects(place, 1));
                    let done = ops::map_cached(self.intake.memory.view.descriptor.fd(), addr.0, len.0, protect);
                    if matches!(done, Done::Failed(Errno::EAGAIN)) {
                        self.intake.memory.view.retry.faults([place]);
                        return false;
                    }
                    if done != Done::All {
                        self.intake.memory.wake(place, 1);
                    }
                    return true;
                }
            }
        }
    }
}
