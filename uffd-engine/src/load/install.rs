//! Bringing content into the guest's memory: claims, and what the kernel says to them.

use std::sync::Arc;

use nix::errno::Errno;
use page_source::{PageBytes, Reply};
use page_units::ByteLen;

use super::intake::{Flow, Intake, stopped};
use crate::EngineError;
use crate::memory::backing::Backing;
use crate::memory::gate::{Gate, holder};
use crate::memory::states::State;
use crate::memory::{Area, Place};
use crate::pause::PausePoint;
use crate::stats::bump;
use crate::sys::ops::{self, Done};

/// Where an install of claimed granules stands after one call to the kernel.
#[derive(Debug)]
pub(super) enum Step {
    /// Some granules are done; go on with the others.
    Advanced(usize),
    /// An event must be read first.
    ReadEvents,
    /// The file does not hold the page (any more).
    Hole,
    /// No more: why.
    Stop(Reply),
}

/// What installs: content, or zeros.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    Bytes(PageBytes<'a>),
    Zeros,
    /// The file behind the memory holds it, as a minor fault says; it may have been cut off the file since.
    Cached,
    /// It was put together in the file behind the memory.
    Gathered,
}

impl Intake {
    /// Installs those of the `granules` of an area that can be claimed, and skips the rest. `bytes` covers exactly these
    /// granules.
    pub(crate) fn install_bytes(&self, area: usize, first: usize, granules: usize, bytes: PageBytes<'_>) -> Flow {
        let (here, states) = (self.memory.area(area), self.memory.states(area));
        let end = first + granules;
        let mut at = first;
        if self.memory.view.gated() {
            self.residency.bring(area, here, first, bytes);
        }
        while at < end {
            let gate = self.memory.view.installing();
            if !states.claim(at) {
                self.not_taken(area, at);
                at += 1;
                continue;
            }
            let longest = (end - at).min(self.longest_install());
            let claimed = 1 + (at + 1..at + longest).take_while(|&granule| states.claim(granule)).count();
            let offset = here.len_of(at - first);
            let part = bytes.slice(offset, here.len_of(claimed));
            let done = self.install(&gate, Place { area, granule: at }, claimed, Content::Bytes(part));
            drop(gate);
            match done {
                Ok(0) => self.blocked(),
                Ok(done) => at += done,
                Err(error) => return Flow::Break(error),
            }
            // What is left of the claim was given back, and is claimed again: an event may have changed it.
        }
        Flow::Continue(())
    }

    /// Installs claimed granules, and settles each of them. Answers how many granules are behind us: fewer than
    /// claimed if an event has to be read first (and 0 if the file holds no cached page); the others are what they were
    /// before the claim then.
    pub(crate) fn install(
        &self,
        gate: &Gate<'_>,
        place: Place,
        claimed: usize,
        content: Content<'_>,
    ) -> Result<usize, Reply> {
        let mut claim = Claim { intake: self, place, left: claimed };
        self.memory.pauses.at(PausePoint::Claimed);
        let area = self.memory.area(place.area);
        while claim.left > 0 {
            let done = claimed - claim.left;
            match self.step(gate, claim.place, claim.left, content, area.len_of(done)) {
                Step::Advanced(granules) => {
                    self.memory.pauses.at(PausePoint::Installed);
                    self.settle_present(claim.place, granules, content);
                    claim.place.granule += granules;
                    claim.left -= granules;
                }
                Step::ReadEvents => {
                    bump(&self.memory.counters.retries, 1);
                    if self.memory.view.on_reader_thread() {
                        // It can't be read here: we are what reads. The fault is served again after the next read.
                        let Place { area, granule } = claim.place;
                        let again = (granule..granule + claim.left).map(|granule| Place { area, granule });
                        self.memory.view.retry.faults(again);
                        return Ok(claimed);
                    }
                    if !self.status.running() {
                        return Err(stopped());
                    }
                    return Ok(done);
                }
                Step::Hole => return Ok(0),
                Step::Stop(error) => return Err(error),
            }
        }
        Ok(claimed)
    }

    fn step(&self, gate: &Gate<'_>, at: Place, granules: usize, content: Content<'_>, offset: ByteLen) -> Step {
        let area = self.memory.area(at.area);
        let frozen = holder(gate);
        // Frozen memory: content comes write-protected, so that it is saved before it is written to. Zeros are known.
        let protect = frozen.is_some_and(|holder| holder.protects(at, granules));
        let fd = self.memory.view.descriptor.fd();
        let (addr, len) = (area.addr(at.granule), area.len_of(granules));
        let (done, unit) = match content {
            Content::Bytes(bytes) => {
                let from = bytes.as_kernel_ptr().wrapping_add(offset.get());
                (ops::copy(fd, addr.0, from, len.0, protect), granules)
            }
            Content::Zeros if frozen.is_some() || area.region.backing == Backing::Hugetlb => {
                (self.zero(gate, at, 1), 1)
            }
            Content::Zeros => (self.zero(gate, at, granules), granules),
            Content::Cached | Content::Gathered => (ops::map_cached(fd, addr.0, len.0, protect), granules),
        };
        let whole = |bytes: u64| usize::try_from(bytes / area.len_of(1).0).unwrap_or(0);
        match done {
            Done::All => Step::Advanced(unit),
            Done::Part(bytes) if whole(bytes) > 0 => Step::Advanced(whole(bytes)),
            Done::Part(_) | Done::Failed(Errno::EAGAIN) => Step::ReadEvents,
            Done::Failed(Errno::EEXIST) => self.exists(gate, at),
            // It begins in one mapping and ends in another (mbind, mlock, madvise, mprotect of a part).
            Done::Failed(Errno::ENOENT) if granules > 1 => self.step(gate, at, granules / 2, content, offset),
            Done::Failed(Errno::ENOMEM) if area.region.backing == Backing::Hugetlb => {
                Step::Stop(self.no_huge_page(area, at))
            }
            Done::Failed(errno) => self.refused(area, at, granules, content, errno),
        }
    }

    /// Zeros for some granules: one, if they are huge or memory is frozen. What is zero now was zero at the freeze point.
    pub(crate) fn zero(&self, gate: &Gate<'_>, at: Place, granules: usize) -> Done {
        let area = self.memory.area(at.area);
        let (addr, len) = (area.addr(at.granule), area.len_of(granules));
        let frozen = holder(gate).filter(|holder| holder.claim_hole(at));
        let done = match area.region.backing {
            Backing::Hugetlb => ops::copy(self.memory.view.descriptor.fd(), addr.0, self.staging.zeros(), len.0, false),
            Backing::Anonymous | Backing::Memfd => ops::zeropage(self.memory.view.descriptor.fd(), addr.0, len.0),
        };
        if let Some(holder) = frozen {
            holder.end_hole(at, done == Done::All);
        }
        done
    }

    fn refused(&self, area: &Area, at: Place, granules: usize, content: Content<'_>, errno: Errno) -> Step {
        let run = area.pages(at.granule, granules);
        match (errno, content) {
            _ if !self.status.running() => Step::Stop(stopped()),
            (Errno::EFAULT, Content::Cached) => Step::Hole,
            (Errno::EFAULT, Content::Bytes(_)) => Step::Stop(Reply::Unreadable(run)),
            (Errno::ESRCH, _) => {
                self.status.fail(EngineError::OwnerGone);
                Step::Stop(stopped())
            }
            _ => {
                let block = Arc::clone(&area.name);
                self.status.fail(EngineError::Install {
                    block,
                    run,
                    at: area.addr(at.granule),
                    errno: crate::Errno::of(errno),
                });
                Step::Stop(stopped())
            }
        }
    }

    fn settle_present(&self, at: Place, granules: usize, content: Content<'_>) {
        let area = self.memory.area(at.area);
        let states = self.memory.states(at.area);
        let (mut wanted, mut answered, mut met) = (0, 0, false);
        for granule in at.granule..at.granule + granules {
            let was = states.settle(granule, State::Present);
            answered += u64::from(was.requested);
            met |= was.met;
            if was.wanted {
                wanted += 1;
                if let Some(since) = self.latencies.remove(Place { granule, ..at }) {
                    self.memory.counters.resolved(since);
                }
            }
        }
        let pages = |granules: u64| granules * area.granule.0;
        match content {
            Content::Bytes(_) | Content::Gathered => {
                bump(&self.memory.counters.demand_pages, pages(wanted));
                bump(&self.memory.counters.background_pages, pages(granules as u64 - wanted));
            }
            Content::Zeros => bump(&self.memory.counters.zero_installed, pages(granules as u64)),
            Content::Cached => {}
        }
        self.answered(pages(answered));
        if met {
            self.was_met();
        }
    }

    /// Maps what the file behind the memory holds of a granule: `false` if it holds nothing, or only a part so far;
    /// `None` if somebody else is at it.
    pub(crate) fn map_cached(&self, gate: &Gate<'_>, place: Place) -> Option<bool> {
        let states = self.memory.states(place.area);
        let claim = || states.claim(place.granule) || states.claim_zero(place.granule);
        match self.staging.unless_gathering(place, claim) {
            None => return Some(false),
            Some(false) => return None,
            Some(true) => {}
        }
        Some(self.install(gate, place, 1, Content::Cached).is_ok_and(|done| done == 1))
    }

    /// How many granules one install covers at most: little where the readers of events wait for it, and least where they
    /// did so lately.
    fn longest_install(&self) -> usize {
        match self.memory.view.gated() {
            true if self.memory.view.gate.priority_lately() => 4,
            true => 32,
            false => 256,
        }
    }
}

/// Claimed granules that are not installed yet. However the install ends, by a panic too, they are given back: they are
/// what they were before, and faults that were left to us are taken again.
pub(crate) struct Claim<'a> {
    intake: &'a Intake,
    place: Place,
    left: usize,
}

impl<'a> Claim<'a> {
    /// Of one granule, which the caller has claimed.
    pub(crate) fn of(intake: &'a Intake, place: Place) -> Claim<'a> {
        Claim { intake, place, left: 1 }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let (intake, Place { area, granule }) = (self.intake, self.place);
        for granule in granule..granule + self.left {
            if intake.memory.states(area).give_back(granule) {
                intake.memory.wake(Place { area, granule }, 1);
                intake.was_met();
            }
        }
    }
}
