//! Bringing content into the guest's memory: claims, and what the kernel says to them.

use std::sync::atomic::Ordering;

use nix::errno::Errno;
use page_source::{ByteLen, Flow, PageBytes, SinkError};

use crate::EngineError;
use crate::core::{Area, Core, Place};
use crate::pause::PausePoint;
use crate::region::Backing;
use crate::state::State;
use crate::stats::bump;
use crate::status::Task;
use crate::sys::ops::{self, Done};

/// Where an install of claimed granules stands after one call to the kernel.
#[derive(Debug)]
enum Step {
    /// So many granules are done; go on with the others.
    Advanced(usize),
    /// An event must be read first.
    ReadEvents,
    /// No more: why.
    Stop(SinkError),
}

/// What installs: content, or zeros.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    Bytes(PageBytes<'a>),
    Zeros,
    /// The file behind the memory holds it.
    Cached,
}

impl Core {
    /// Installs what of `granules` of an area may be installed. `bytes` covers exactly these granules.
    pub(crate) fn install_bytes(&self, area: usize, first: usize, granules: usize, bytes: PageBytes<'_>) -> Flow {
        let states = &self.areas[area].states;
        let end = first + granules;
        let mut at = first;
        while at < end {
            let gate = self.installing();
            if !states.claim(at) {
                self.not_taken(area, at);
                at += 1;
                continue;
            }
            let longest = (end - at).min(self.longest_install());
            let claimed = 1 + (at + 1..at + longest).take_while(|&granule| states.claim(granule)).count();
            let offset = self.areas[area].len_of(at - first);
            let part = bytes.slice(offset, self.areas[area].len_of(claimed));
            let done = self.install(Place { area, granule: at }, claimed, Content::Bytes(part));
            drop(gate);
            match done {
                Ok(done) => at += done,
                Err(error) => return Flow::Break(error),
            }
            // What is left of the claim was given back, and is claimed again: an event may have changed it.
        }
        Flow::Continue(())
    }

    /// Installs claimed granules, and settles each of them. Answers how many granules are behind us: fewer than
    /// claimed if an event has to be read first; the others are Missing (or Removed) again then.
    pub(crate) fn install(&self, place: Place, claimed: usize, content: Content<'_>) -> Result<usize, SinkError> {
        self.pauses.at(PausePoint::Claimed);
        let area = &self.areas[place.area];
        let mut done = 0;
        while done < claimed {
            let at = Place { granule: place.granule + done, ..place };
            match self.step(area, at, claimed - done, content, area.len_of(done)) {
                Step::Advanced(granules) => {
                    self.pauses.at(PausePoint::Installed);
                    self.settle_present(at, granules, content);
                    done += granules;
                }
                Step::ReadEvents => {
                    bump(&self.counters.retries, 1);
                    self.give_back(at, claimed - done, content);
                    if self.on_reader_thread() {
                        // It can't be read here: we are what reads. The fault is served again after the next read.
                        self.deferred
                            .lock()
                            .extend((0..claimed - done).map(|i| Place { granule: at.granule + i, ..at }));
                        return Ok(claimed);
                    }
                    if !self.status.running() {
                        return Err(stopped());
                    }
                    std::thread::yield_now();
                    return Ok(done);
                }
                Step::Stop(error) => {
                    self.give_back(at, claimed - done, content);
                    return Err(error);
                }
            }
        }
        Ok(done)
    }

    fn step(&self, area: &Area, at: Place, granules: usize, content: Content<'_>, offset: ByteLen) -> Step {
        let fd = self.descriptor.fd();
        let (addr, len) = (area.addr(at.granule), area.len_of(granules));
        let huge = area.region.backing == Backing::Hugetlb;
        let (done, unit) = match content {
            Content::Bytes(bytes) => {
                let from = bytes.as_kernel_ptr().wrapping_add(offset.get());
                (ops::copy(fd, addr.0, from, len.0), granules)
            }
            Content::Zeros if huge => {
                let one = area.len_of(1).0;
                (ops::copy(fd, addr.0, self.staging.zeros(), one), 1)
            }
            Content::Zeros => (ops::zeropage(fd, addr.0, len.0), granules),
            Content::Cached => (ops::map_cached(fd, addr.0, len.0), granules),
        };
        let whole = |bytes: u64| usize::try_from(bytes / area.len_of(1).0).unwrap_or(0);
        match done {
            Done::All => Step::Advanced(unit),
            Done::Part(bytes) if whole(bytes) > 0 => Step::Advanced(whole(bytes)),
            Done::Part(_) | Done::Failed(Errno::EAGAIN) => Step::ReadEvents,
            Done::Failed(Errno::EEXIST) => self.exists(area, at),
            Done::Failed(errno) => self.refused(area, at, granules, content, errno),
        }
    }

    /// Somebody was faster: the page is mapped, or the file behind shared memory holds it. Its waiters are woken.
    fn exists(&self, area: &Area, at: Place) -> Step {
        let (addr, len) = (area.addr(at.granule), area.len_of(1));
        if area.region.backing != Backing::Anonymous {
            match ops::map_cached(self.descriptor.fd(), addr.0, len.0) {
                Done::All => return Step::Advanced(1),
                Done::Part(_) | Done::Failed(Errno::EAGAIN) => return Step::ReadEvents,
                // EEXIST: mapped. EINVAL, EFAULT: a private mapping whose page is not the file's.
                Done::Failed(_) => {}
            }
        }
        if let Err(error) = self.descriptor.wake(addr, len) {
            log::debug!("waking the waiters of {addr} failed: {error}");
        }
        Step::Advanced(1)
    }

    fn refused(&self, area: &Area, at: Place, granules: usize, content: Content<'_>, errno: Errno) -> Step {
        let run = area.pages(at.granule, granules);
        match (errno, content) {
            _ if !self.status.running() => Step::Stop(stopped()),
            (Errno::EFAULT, Content::Bytes(_)) => Step::Stop(SinkError::Unreadable(run)),
            (Errno::ESRCH, _) => {
                self.status.fail(EngineError::OwnerGone);
                Step::Stop(stopped())
            }
            _ => {
                self.status.fail(EngineError::Install { run, at: area.addr(at.granule), errno });
                Step::Stop(stopped())
            }
        }
    }

    /// Claimed granules that were not installed. What was content is Missing again; what was zero stays zero.
    fn give_back(&self, at: Place, granules: usize, content: Content<'_>) {
        let state = match content {
            Content::Zeros => State::Zero,
            Content::Bytes(_) | Content::Cached => State::Missing,
        };
        for granule in at.granule..at.granule + granules {
            self.areas[at.area].states.settle(granule, state);
        }
    }

    fn settle_present(&self, at: Place, granules: usize, content: Content<'_>) {
        let area = &self.areas[at.area];
        let (mut wanted, mut answered) = (0, 0);
        for granule in at.granule..at.granule + granules {
            let was = area.states.settle(granule, State::Present);
            answered += u64::from(was.requested);
            if was.wanted {
                wanted += 1;
                self.answered_late(Place { granule, ..at });
            }
        }
        let pages = |granules: u64| granules * area.granule.0;
        match content {
            Content::Bytes(_) => {
                bump(&self.counters.demand_pages, pages(wanted));
                bump(&self.counters.background_pages, pages(granules as u64 - wanted));
            }
            Content::Zeros => bump(&self.counters.zero_installed, pages(granules as u64)),
            Content::Cached => {}
        }
        self.answered(pages(answered));
    }

    /// A fault that waited for a late source, if it did, has its page now.
    fn answered_late(&self, place: Place) {
        if let Some(since) = self.waiting.remove(place) {
            self.counters.resolved(since);
        }
    }

    /// Content arrived that is not needed: the guest has the page, gave it back, or somebody else is at it.
    pub(crate) fn not_taken(&self, area: usize, granule: usize) {
        bump(&self.counters.duplicates, self.areas[area].granule.0);
        if self.areas[area].states.unrequest(granule) {
            self.answered(self.areas[area].granule.0);
        }
    }

    /// So many requested pages have ended. After the last one there may be nothing left to do.
    pub(crate) fn answered(&self, pages: u64) {
        if self.outstanding.answered(pages) {
            self.status.tell(Task::Check);
        }
    }

    /// Zeros for claimed granules, on demand.
    pub(crate) fn install_zeros(&self, place: Place, claimed: usize) -> Result<usize, SinkError> {
        self.install(place, claimed, Content::Zeros)
    }

    /// Poisons what of a range is Missing, without waiting for what is under way.
    pub(crate) fn poison(&self, area: usize, first: usize, granules: usize) {
        let part = &self.areas[area];
        for granule in first..first + granules {
            if part.states.poison(granule) {
                if part.states.unrequest(granule) {
                    self.answered(part.granule.0);
                }
                self.poison_in_kernel(area, granule);
            }
        }
    }

    /// The kernel's part of it. A page that is there already is woken, not poisoned.
    pub(crate) fn poison_in_kernel(&self, area: usize, granule: usize) {
        let part = &self.areas[area];
        let (addr, len) = (part.addr(granule), part.len_of(1));
        loop {
            match ops::poison(self.descriptor.fd(), addr.0, len.0) {
                Done::All => break bump(&self.counters.poisoned, part.granule.0),
                Done::Failed(Errno::EAGAIN) | Done::Part(_) if !self.on_reader_thread() => std::thread::yield_now(),
                Done::Failed(Errno::EAGAIN) | Done::Part(_) => {
                    break self.deferred.lock().push(Place { area, granule });
                }
                Done::Failed(Errno::EEXIST) => {
                    break drop(self.descriptor.wake(addr, len));
                }
                Done::Failed(errno) => {
                    log::error!("poisoning {} failed: {errno}", part.pages(granule, 1));
                    self.staging.cannot_poison.store(true, Ordering::Release);
                    break;
                }
            }
        }
    }
}

pub(crate) fn stopped() -> SinkError {
    SinkError::Stopped { reason: "the engine has ended".into() }
}
