//! Serving writers: the old content is copied away, the writer goes on.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_units::{ByteLen, HostAddr};

use super::freeze::{Shared, Zone};
use super::frozen::FrozenError;
use super::owner::{self, Owner};
use super::pool::Copied;
use crate::EngineError;
use crate::memory::Place;
use crate::memory::backing::Backing;
use crate::memory::holder::Holder;
use crate::pause::PausePoint;
use crate::serve::placement::bind;
use crate::sys::abi::{Message, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UFFD_PAGEFAULT_FLAG_WP};
use crate::sys::memory::read_granule;
use crate::sys::ops::{self, Done};

/// So many messages are read at a time at most.
const BATCH: usize = 64;

/// Serves write faults until the freeze is over.
pub(crate) fn run(shared: &Shared, handler: usize, cpu: Option<usize>) {
    bind(cpu);
    let Owner::Freeze { descriptor, event, .. } = &shared.owner else { return };
    let mut messages = [Message::default(); BATCH];
    let mut again: Vec<(HostAddr, u64)> = Vec::new();
    while !shared.has_ended() {
        let wait = if again.is_empty() { PollTimeout::NONE } else { PollTimeout::ZERO };
        let mut fds = [PollFd::new(descriptor.fd(), PollFlags::POLLIN), PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return fail(shared, "waiting for faults", HostAddr(0), errno),
        }
        shared.owner.turn(handler);
        let count = match ops::read(descriptor.fd(), &mut messages) {
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return fail(shared, "reading faults", HostAddr(0), errno),
        };
        for message in &messages[..count] {
            if matches!(message.event, UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP) {
                shared.given_back(HostAddr(message.word0), HostAddr(message.word1));
            }
        }
        shared.owner.turn(handler);
        let mut faults = std::mem::take(&mut again);
        let fresh = messages[..count].iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT);
        faults.extend(fresh.map(|message| (HostAddr(message.word1), message.word0)));
        again.extend(faults.into_iter().filter(|&(addr, flags)| !serve(shared, addr, flags)));
        if !again.is_empty() {
            std::thread::yield_now();
        }
    }
}

fn fail(shared: &Shared, what: &'static str, at: HostAddr, errno: Errno) {
    if !shared.has_ended() {
        shared.end(Err(FrozenError::Kernel { what, at, errno }));
    }
}

impl Shared {
    /// Memory was given back. What of it was not saved is lost to the snapshot.
    pub(crate) fn given_back(&self, start: HostAddr, end: HostAddr) {
        if let Some((start, end)) = self.unsaved(start, end) {
            self.end(Err(FrozenError::Discarded { start, end }));
        }
    }

    /// Which part of a range, that of the first zone, is not saved as a whole.
    fn unsaved(&self, start: HostAddr, end: HostAddr) -> Option<(HostAddr, HostAddr)> {
        self.zones.iter().find_map(|zone| {
            let range = zone.region.range();
            let (from, to) = (start.max(range.start), end.min(range.end));
            if from >= to {
                return None;
            }
            let unit = zone.granule.bytes().0;
            let first = ByteLen((from - range.start).0 / unit).get();
            let last = ByteLen((to - range.start).0.div_ceil(unit)).get();
            (first..last).any(|granule| !zone.saved.may_change(granule)).then_some((from, to))
        })
    }
}

impl Holder for Shared {
    fn has_ended(&self) -> bool {
        Shared::has_ended(self)
    }

    fn protects(&self, at: Place, granules: usize) -> bool {
        let saved = &self.zones[at.area].saved;
        (at.granule..at.granule + granules).any(|granule| !saved.may_change(granule))
    }

    fn claim_hole(&self, at: Place) -> bool {
        self.zones[at.area].saved.claim(at.granule)
    }

    fn end_hole(&self, at: Place, installed: bool) {
        let zone = &self.zones[at.area];
        if installed {
            self.hole_faults.fetch_add(1, Ordering::Relaxed);
            return zone.saved.hole(at.granule);
        }
        zone.saved.give_back(at.granule);
        // Its writers may have been told meanwhile that the claimer would release them.
        drop(self.owner.descriptor().wake(zone.addr(at.granule), zone.len_of(1)));
    }

    fn write(&self, at: Place) -> bool {
        write(self, at.area, at.granule)
    }

    fn needs(&self, start: HostAddr, end: HostAddr) -> bool {
        self.unsaved(start, end).is_some()
    }

    fn given_back(&self, start: HostAddr, end: HostAddr) {
        Shared::given_back(self, start, end);
    }

    fn engine_failed(&self, error: &EngineError) {
        self.end(Err(FrozenError::Engine(Box::new(error.clone()))));
    }

    fn thaw(&self) {
        if let Owner::Engine { memory, fetch } = &self.owner {
            owner::thaw(memory, &**fetch, self);
        }
    }
}

/// Serves one fault. `false` if it has to be tried again after an event was read.
fn serve(shared: &Shared, addr: HostAddr, flags: u64) -> bool {
    let Some((number, granule)) = locate(shared, addr) else { return true };
    let zone = &shared.zones[number];
    if flags & UFFD_PAGEFAULT_FLAG_WP == 0 { hole(shared, zone, granule) } else { write(shared, number, granule) }
}

fn locate(shared: &Shared, addr: HostAddr) -> Option<(usize, usize)> {
    shared.zones.iter().enumerate().find_map(|(number, zone)| {
        let range = zone.region.range();
        range.contains(&addr).then(|| (number, ByteLen((addr - range.start).0 / zone.granule.bytes().0).get()))
    })
}

/// A page that does not exist is zero at the freeze point. Its toucher gets an ordinary page.
fn hole(shared: &Shared, zone: &Zone, granule: usize) -> bool {
    let (addr, len) = (zone.addr(granule), zone.len_of(1));
    // Claimed by the saver: it found no page, and will not look again.
    let claimed = zone.saved.claim(granule);
    let done = match zone.region.backing {
        Backing::Hugetlb => ops::copy(shared.owner.descriptor().fd(), addr.0, shared.zeros(), len.0, false),
        Backing::Anonymous | Backing::Memfd => ops::zeropage(shared.owner.descriptor().fd(), addr.0, len.0),
    };
    if matches!(done, Done::Failed(Errno::EAGAIN) | Done::Part(_)) {
        if claimed {
            zone.saved.give_back(granule);
        }
        return false;
    }
    if done == Done::Failed(Errno::ENOMEM) {
        // Touched again and again, it would fail again and again.
        if claimed {
            zone.saved.give_back(granule);
        }
        fail(shared, "a page of zeros", addr, Errno::ENOMEM);
        return true;
    }
    if done != Done::All {
        drop(shared.owner.descriptor().wake(addr, len));
    }
    if claimed {
        shared.settle();
        shared.hole_faults.fetch_add(1, Ordering::Relaxed);
        zone.saved.hole(granule);
    }
    true
}

/// A page that is about to be written.
fn write(shared: &Shared, number: usize, granule: usize) -> bool {
    let zone = &shared.zones[number];
    let addr = zone.addr(granule);
    if zone.saved.may_change(granule) {
        return release(shared, zone, granule);
    }
    if !zone.saved.claim(granule) {
        // The saver is copying it, and releases it, and wakes its writers.
        return true;
    }
    let Some(mut buffer) = shared.pool.take() else {
        shared.waits.fetch_add(1, Ordering::Relaxed);
        shared.pause(PausePoint::PoolFull);
        zone.saved.give_back(granule);
        shared.parked.lock().push((number, granule));
        shared.wake_saver();
        shared.pause(PausePoint::WriterWaits);
        return true;
    };
    read_granule(addr, buffer.bytes_mut());
    if matches!(shared.owner, Owner::Freeze { .. }) {
        // An engine's handler holds its gate.
        shared.settle();
    }
    shared.write_faults.fetch_add(1, Ordering::Relaxed);
    shared.pause(PausePoint::Copied);
    let first = shared.pool.push(Copied { area: number, granule, buffer });
    zone.saved.done(granule);
    if first {
        shared.wake_saver();
    }
    release(shared, zone, granule)
}

/// Takes the protection off a saved granule, and wakes its writers.
fn release(shared: &Shared, zone: &Zone, granule: usize) -> bool {
    let (addr, len) = (zone.addr(granule), zone.len_of(1));
    match ops::write_protect(shared.owner.descriptor().fd(), addr.0, len.0, false) {
        Ok(()) => true,
        Err(Errno::EAGAIN) => false,
        Err(errno) => {
            fail(shared, "releasing a page", addr, errno);
            true
        }
    }
}
