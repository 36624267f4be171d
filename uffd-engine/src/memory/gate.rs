//! The gate: installs go through it side by side; whoever freezes the memory, or reads events, goes through it alone.
//!
//! A discard goes on the moment its event is read, so an event is read while no install is under way. Two things make
//! that cheap for a fault:
//!
//! - Whoever reads comes in haste: others let it go first, and nobody sleeps for so short a time.
//! - A handler that waits in `poll`, and enters when there is something to read, pays a system call more for each fault.
//!   One that is alone, and was not disturbed for a while, enters first and waits for the next message *inside*. Whoever
//!   wants in meanwhile knocks: touches a page, which is a message too. A page serves for one knock only: to make it
//!   missing again would be a discard, with an event of its own.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use page_units::{ByteLen, HostAddr, PageCount};
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use userfaultfd::RegisterMode;

use crate::freeze::Shared;
use crate::memory::descriptor::Descriptor;
use crate::sys::memory::Scratch;

/// Who has frozen the memory, if somebody has: installs are ordered with that.
type Holder = Option<Arc<Shared>>;

/// Somebody installs: nothing is frozen, and no event is read, before it is dropped.
pub(crate) type Gate<'a> = RwLockReadGuard<'a, Holder>;
/// Nobody installs until it is dropped.
pub(crate) type Alone<'a> = RwLockWriteGuard<'a, Holder>;

/// So often a handler may be disturbed inside. After that it stays outside.
pub(crate) const KNOCKS: u64 = 12;

/// Of the pages to knock at.
const LEN: ByteLen = PageCount(KNOCKS).to_bytes();

#[derive(Debug, Default)]
pub(crate) struct GateLock {
    lock: RwLock<Holder>,
    /// How many have a message to read, and look for their turn without a pause, or are at it.
    hasty: AtomicUsize,
    /// So many more times somebody asks whether there was haste lately, there was.
    lately: AtomicUsize,
    /// How many want in and could not enter at once.
    wanted: AtomicUsize,
    /// One more than the number of the page at which a handler inside hears a knock; 0 if none is inside.
    inside: AtomicU64,
    /// The pages to knock at, once they are needed; `None` if they can't be had.
    pages: OnceLock<Option<Scratch>>,
}

impl GateLock {
    /// Enters beside others, after whoever is in haste.
    pub(crate) fn shared(&self) -> Gate<'_> {
        let enter = || if self.hasty.load(Ordering::Relaxed) == 0 { self.lock.try_read() } else { None };
        // Whoever waits inside is not in haste.
        let soon = || if self.inside.load(Ordering::Relaxed) == 0 { spin(enter) } else { None };
        enter().or_else(soon).unwrap_or_else(|| self.knock_and(RwLock::read))
    }

    /// Enters alone.
    pub(crate) fn alone(&self) -> Alone<'_> {
        self.lock.try_write().unwrap_or_else(|| self.knock_and(RwLock::write))
    }

    /// Enters alone as soon as those leave who are inside: somebody waits for a page.
    pub(crate) fn alone_in_haste(&self) -> InHaste<'_> {
        self.hasty.fetch_add(1, Ordering::Relaxed);
        self.lately.store(LATELY, Ordering::Relaxed);
        let alone = spin(|| self.lock.try_write()).unwrap_or_else(|| self.alone());
        InHaste { gate: self, alone: Some(alone) }
    }

    /// Whether somebody was in haste, not many questions ago.
    pub(crate) fn in_haste_lately(&self) -> bool {
        let left = self.lately.load(Ordering::Relaxed);
        // Approximate where several ask.
        self.lately.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    /// A handler sees that somebody is wanted before it waits, or is seen to be inside and hears the knock.
    fn knock_and<'a, G>(&'a self, enter: impl FnOnce(&'a RwLock<Holder>) -> G) -> G {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let heard_at = self.inside.load(Ordering::SeqCst).checked_sub(1);
        if let (Some(page), Some(Some(pages))) = (heard_at, self.pages.get()) {
            pages.touch(PageCount(page).to_bytes());
        }
        let gate = enter(&self.lock);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        gate
    }

    /// Enters alone, to wait inside for a message; the knock is heard at this page. `None` if somebody is at it: the
    /// page may be spent then.
    ///
    /// One handler at a time may do so.
    pub(crate) fn wait_inside<'a>(&'a self, descriptor: &'a Descriptor, page: u64) -> Option<Inside<'a>> {
        self.pages.get_or_init(|| pages(descriptor)).as_ref().filter(|_| page < KNOCKS)?;
        let alone = self.lock.try_write()?;
        self.inside.store(page + 1, Ordering::SeqCst);
        let inside = Inside { gate: self, descriptor, alone: Some(alone) };
        (self.wanted.load(Ordering::SeqCst) == 0).then_some(inside)
    }

    /// Whether a fault at `addr` is a knock. Whoever knocked goes on already.
    pub(crate) fn is_knock(&self, addr: HostAddr) -> bool {
        let Some(Some(pages)) = self.pages.get() else { return false };
        (pages.addr()..pages.addr() + LEN).contains(&addr)
    }
}

/// See [`GateLock::in_haste_lately`].
const LATELY: usize = 256;

/// An install takes less than that. Waking whoever sleeps, on another core, takes longer.
const SPIN: Duration = Duration::from_micros(50);

/// Looks again and again, but not for long: whoever is waited for may be waiting for this core.
fn spin<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    look().or_else(|| {
        let begun = Instant::now();
        std::iter::from_fn(|| (begun.elapsed() < SPIN).then(std::hint::spin_loop)).find_map(|()| look())
    })
}

/// Alone, to read what somebody waits for. Others wait awake.
#[derive(Debug)]
pub(crate) struct InHaste<'a> {
    gate: &'a GateLock,
    alone: Option<Alone<'a>>,
}

impl<'a> InHaste<'a> {
    pub(crate) fn alone(&self) -> Option<&Alone<'a>> {
        self.alone.as_ref()
    }
}

impl Drop for InHaste<'_> {
    fn drop(&mut self) {
        self.alone = None;
        self.gate.hasty.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pages to knock at. Without them nobody waits inside.
fn pages(descriptor: &Descriptor) -> Option<Scratch> {
    let pages = Scratch::missing(LEN).map_err(|error| log::debug!("no memory for knocking: {error}")).ok()?;
    match descriptor.register(pages.addr(), LEN, RegisterMode::MISSING) {
        Ok(()) => Some(pages),
        Err(error) => {
            log::debug!("registering the pages for knocking failed: {error}");
            None
        }
    }
}

/// A handler is inside, alone, and waits for a message or is about to.
#[derive(Debug)]
pub(crate) struct Inside<'a> {
    gate: &'a GateLock,
    descriptor: &'a Descriptor,
    alone: Option<Alone<'a>>,
}

impl<'a> Inside<'a> {
    /// It has its message, and is still alone. Whether somebody wants in.
    pub(crate) fn ready(mut self) -> (Option<Alone<'a>>, bool) {
        let wanted = self.hear();
        (self.alone.take(), wanted)
    }

    /// Lets whoever knocked go on to the gate itself, before anything else is done: they may hold locks.
    fn hear(&mut self) -> bool {
        let page = self.gate.inside.swap(0, Ordering::SeqCst).checked_sub(1);
        // Whoever still saw us inside is counted already.
        let wanted = self.gate.wanted.load(Ordering::SeqCst) > 0;
        if let (true, Some(page), Some(Some(pages))) = (wanted, page, self.gate.pages.get()) {
            self.descriptor.silence(pages.addr() + PageCount(page).to_bytes(), PageCount(1).to_bytes());
        }
        wanted
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.hear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Features;

    fn descriptor() -> Descriptor {
        Descriptor::create(Features::EVENT_REMOVE, Features::empty(), true).unwrap()
    }

    /// Whoever is in haste may be kept from going on by those who wait for it.
    #[test]
    fn haste_that_takes_long_stops_nobody() {
        let gate = GateLock::default();
        gate.hasty.fetch_add(1, Ordering::Relaxed);
        drop(gate.shared());
        // And the other way round.
        let inside = gate.shared();
        std::thread::scope(|scope| {
            let hasty = scope.spawn(|| assert!(gate.alone_in_haste().alone().is_some()));
            while gate.wanted.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            drop(inside);
            hasty.join().unwrap();
        });
        assert_eq!(gate.hasty.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn haste_is_remembered_for_a_while() {
        let gate = GateLock::default();
        assert!(!gate.in_haste_lately());
        drop(gate.alone_in_haste());
        assert_eq!((0..).take_while(|_| gate.in_haste_lately()).count(), LATELY);
    }

    /// Whoever wants in and saw nobody inside waits at the lock, and does not knock.
    #[test]
    fn nobody_stays_inside_when_somebody_wants_in() {
        testkit::require!(Userfaultfd);
        let (gate, descriptor) = (GateLock::default(), descriptor());
        gate.wanted.fetch_add(1, Ordering::SeqCst);
        assert!(gate.wait_inside(&descriptor, 0).is_none());
        assert_eq!(gate.inside.load(Ordering::SeqCst), 0);
        drop(gate.shared());
        gate.wanted.fetch_sub(1, Ordering::SeqCst);
        assert!(!gate.wait_inside(&descriptor, 1).unwrap().ready().1);
        assert!(gate.wait_inside(&descriptor, KNOCKS).is_none(), "there is no page for it");
    }

    /// Whoever saw it inside and has not touched the page yet finds ordinary memory there.
    #[test]
    fn a_knock_that_comes_late_is_no_fault() {
        testkit::require!(Userfaultfd);
        let (gate, descriptor) = (GateLock::default(), descriptor());
        let inside = gate.wait_inside(&descriptor, 3).unwrap();
        gate.wanted.fetch_add(1, Ordering::SeqCst);
        let (alone, wanted) = inside.ready();
        assert!(wanted && alone.is_some());
        let pages = gate.pages.get().unwrap().as_ref().unwrap();
        assert_eq!(pages.touch(PageCount(3).to_bytes()), 0);
        assert!(gate.is_knock(pages.addr() + ByteLen(LEN.0 - 1)) && !gate.is_knock(pages.addr() + LEN));
    }
}
