//! Serving writers: the old content is copied away, the writer goes on.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_units::{ByteLen, HostAddr};

use super::error::FrozenError;
use super::freeze::Freeze;
use super::owner::{self, By};
use super::pool::Copied;
use super::zone::Zone;
use crate::EngineError;
use crate::memory::Place;
use crate::memory::backing::Backing;
use crate::memory::holder::Holder;
use crate::memory::states::State;
use crate::pause::PausePoint;
use crate::serve::placement::bind;
use crate::sys::abi::{Message, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UFFD_PAGEFAULT_FLAG_WP};
use crate::sys::ops::{self, Done};

/// How many messages are read at a time at most.
const BATCH: usize = 64;

/// Serves write faults until the freeze is over.
pub(crate) fn run(freeze: &Freeze, handler: usize, cpu: Option<usize>) {
    bind(cpu);
    let Some(own) = freeze.owner.own() else { return };
    let (descriptor, event) = (&own.descriptor, &own.event);
    let mut messages = [Message::default(); BATCH];
    let mut again: Vec<(HostAddr, u64)> = Vec::new();
    while own.needed() && !freeze.has_ended() {
        let wait = if again.is_empty() { PollTimeout::NONE } else { PollTimeout::ZERO };
        let mut fds = [PollFd::new(descriptor.fd(), PollFlags::POLLIN), PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, wait) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return fail(freeze, "waiting for faults", HostAddr(0), errno),
        }
        own.turn(handler);
        let count = match ops::read(descriptor.fd(), &mut messages) {
            Ok(count) => count,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return fail(freeze, "reading faults", HostAddr(0), errno),
        };
        for message in &messages[..count] {
            if matches!(message.event, UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP) {
                freeze.given_back(HostAddr(message.word0), HostAddr(message.word1));
            }
        }
        own.turn(handler);
        let mut faults = std::mem::take(&mut again);
        let fresh = messages[..count].iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT);
        faults.extend(fresh.map(|message| (HostAddr(message.word1), message.word0)));
        again.extend(faults.into_iter().filter(|&(addr, flags)| !serve(freeze, addr, flags)));
        if !again.is_empty() {
            std::thread::yield_now();
        }
    }
}

fn fail(freeze: &Freeze, what: &'static str, at: HostAddr, errno: Errno) {
    if !freeze.has_ended() {
        freeze.end(Err(FrozenError::kernel(what, at, errno)));
    }
}

impl Freeze {
    /// Memory was given back. The part that was not saved is lost to the snapshot.
    pub(crate) fn given_back(&self, start: HostAddr, end: HostAddr) {
        if let Some((start, end)) = self.unsaved(start, end) {
            self.end(Err(FrozenError::Discarded { start, end }));
        }
    }

    /// Whether a page of shared memory that was there at the freeze point, and is not saved, is missing: the file was
    /// punched (fallocate), of which the kernel tells nobody.
    fn is_lost(&self, number: usize, granule: usize) -> bool {
        let zone = &self.zones[number];
        zone.region.shared
            && self.known.is_exact()
            && !zone.saved.may_change(granule)
            && self.known.existed(zone.pages(granule, 1)).contains(&true)
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

impl Holder for Freeze {
    fn has_ended(&self) -> bool {
        Freeze::has_ended(self)
    }

    fn protects(&self, at: Place, granules: usize) -> bool {
        let saved = &self.zones[at.area].saved;
        (at.granule..at.granule + granules).any(|granule| !saved.may_change(granule))
    }

    fn claim_hole(&self, at: Place) -> bool {
        let zone = &self.zones[at.area];
        if let By::Engine { memory, .. } = self.owner.by()
            && memory.states(at.area).get(at.granule).state == State::Present
            && self.known.was_whole(at.area)
            && !zone.saved.may_change(at.granule)
        {
            // The file was punched (fallocate).
            let start = zone.addr(at.granule);
            self.end(Err(FrozenError::Discarded { start, end: start + zone.len_of(1) }));
            return false;
        }
        zone.saved.claim(at.granule)
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
        Freeze::given_back(self, start, end);
    }

    fn engine_failed(&self, error: &EngineError) {
        self.end(Err(FrozenError::Engine(Box::new(error.clone()))));
    }

    fn thaw(&self) {
        if let By::Engine { memory, fetch } = self.owner.by() {
            owner::thaw(memory, fetch, &self.zones, self);
        }
    }
}

/// Serves one fault. `false` if it has to be tried again after an event was read.
fn serve(freeze: &Freeze, addr: HostAddr, flags: u64) -> bool {
    let Some((number, granule)) = locate(freeze, addr) else { return true };
    if flags & UFFD_PAGEFAULT_FLAG_WP == 0 { hole(freeze, number, granule) } else { write(freeze, number, granule) }
}

fn locate(freeze: &Freeze, addr: HostAddr) -> Option<(usize, usize)> {
    freeze.zones.iter().enumerate().find_map(|(number, zone)| {
        let range = zone.region.range();
        range.contains(&addr).then(|| (number, ByteLen((addr - range.start).0 / zone.granule.bytes().0).get()))
    })
}

/// A page that does not exist is zero at the freeze point. Its toucher gets an ordinary page.
fn hole(freeze: &Freeze, number: usize, granule: usize) -> bool {
    let zone = &freeze.zones[number];
    let (addr, len) = (zone.addr(granule), zone.len_of(1));
    if freeze.is_lost(number, granule) {
        freeze.end(Err(FrozenError::Discarded { start: addr, end: addr + len }));
        return true;
    }
    // Claimed by the saver: it found no page, and will not look again.
    let claimed = zone.saved.claim(granule);
    let fd = freeze.owner.descriptor().fd();
    let make = || match zone.region.backing {
        Backing::Hugetlb => ops::copy(fd, addr.0, freeze.zeros(), len.0, false),
        Backing::Anonymous | Backing::Memfd => ops::zeropage(fd, addr.0, len.0),
    };
    let done = freeze.known.make(number, make, |done| *done == Done::All);
    let give_back = || {
        if claimed {
            zone.saved.give_back(granule);
        }
    };
    match done {
        Done::All => {}
        Done::Failed(Errno::EAGAIN) | Done::Part(_) => {
            give_back();
            return false;
        }
        // Touched again and again, it would fail again and again.
        Done::Failed(Errno::ENOMEM) => {
            give_back();
            fail(freeze, "a page of zeros", addr, Errno::ENOMEM);
            return true;
        }
        // The kernel says so too if there is no huge page left (`hugetlb_mfill_atomic_pte` of Linux 6.18).
        Done::Failed(Errno::EEXIST)
            if !freeze.populated.page_table().has(addr, zone.region.backing == Backing::Hugetlb) =>
        {
            give_back();
            match zone.region.backing {
                Backing::Hugetlb => fail(freeze, "a huge page of zeros", addr, Errno::ENOMEM),
                Backing::Anonymous | Backing::Memfd => drop(freeze.owner.descriptor().wake(addr, len)),
            }
            return true;
        }
        // It is there, or the region is being unregistered.
        Done::Failed(_) => drop(freeze.owner.descriptor().wake(addr, len)),
    }
    if claimed {
        freeze.settle();
        freeze.hole_faults.fetch_add(1, Ordering::Relaxed);
        zone.saved.hole(granule);
    }
    true
}

/// A page that is about to be written.
fn write(freeze: &Freeze, number: usize, granule: usize) -> bool {
    let zone = &freeze.zones[number];
    let addr = zone.addr(granule);
    if zone.saved.may_change(granule) {
        return release(freeze, zone, granule);
    }
    if !zone.saved.claim(granule) {
        // The saver is copying it, and releases it, and wakes its writers.
        return true;
    }
    let Some(mut buffer) = freeze.pool.take() else {
        freeze.waits.fetch_add(1, Ordering::Relaxed);
        freeze.pause(PausePoint::PoolFull);
        zone.saved.give_back(granule);
        freeze.parked.lock().push((number, granule));
        freeze.wake_saver();
        freeze.pause(PausePoint::WriterWaits);
        return true;
    };
    if let Err(errno) = zone.reading.read_touched(addr, buffer.bytes_mut()) {
        freeze.pool.give_back(buffer);
        zone.saved.give_back(granule);
        fail(freeze, "reading guest memory", addr, errno);
        return true;
    }
    if matches!(freeze.owner.by(), By::Freeze(_)) {
        // An engine's handler holds its gate.
        freeze.settle();
    }
    freeze.write_faults.fetch_add(1, Ordering::Relaxed);
    freeze.pause(PausePoint::Copied);
    let first = freeze.pool.push(Copied { area: number, granule, buffer });
    zone.saved.done(granule);
    if first {
        freeze.wake_saver();
    }
    release(freeze, zone, granule)
}

/// Takes the protection off a saved granule, and wakes its writers.
fn release(freeze: &Freeze, zone: &Zone, granule: usize) -> bool {
    let (addr, len) = (zone.addr(granule), zone.len_of(1));
    match ops::write_protect(freeze.owner.descriptor().fd(), addr.0, len.0, false) {
        Ok(()) => true,
        Err(Errno::EAGAIN) => false,
        Err(errno) => {
            fail(freeze, "releasing a page", addr, errno);
            true
        }
    }
}
