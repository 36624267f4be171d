//! The gate: installs go through it side by side; a freeze, and a handler that reads events, go through it alone.
//!
//! A discard goes on the moment its event is read, so an event is read while no install is under way. Two things make
//! that cheap for a fault:
//!
//! - A reader has priority: others let it go first, and nobody sleeps for so short a time.
//! - A handler that waits in `poll`, and enters when there is something to read, pays a system call more for each fault.
//!   A single handler that was not interrupted for a while enters first and parks: it waits for the next message
//!   *inside*. An installer that wants in meanwhile interrupts it: it touches a page, which is a message too.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use page_units::{HostAddr, PageCount};
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::descriptor::Descriptor;
use super::holder::Holder;
use super::own_pages::OwnPages;

/// The freeze under way, if there is one: installs are ordered with it.
type Held = Option<Arc<dyn Holder>>;

/// Held by an installer: nothing is frozen, and no event is read, before it is dropped.
pub(crate) type Gate<'a> = RwLockReadGuard<'a, Held>;
/// Nothing is installed until it is dropped.
pub(crate) type Alone<'a> = RwLockWriteGuard<'a, Held>;

/// How often a handler may be interrupted while it is parked. After that it stays outside.
pub(crate) const INTERRUPTS: u64 = 12;

#[derive(Debug, Default)]
pub(crate) struct GateLock {
    lock: RwLock<Held>,
    /// How many threads have a message to read, and look for their turn without a pause, or are at it.
    priority: AtomicUsize,
    /// How many more calls to [`priority_lately`](GateLock::priority_lately) will answer yes.
    lately: AtomicUsize,
    /// How many threads want in and could not enter at once.
    wanted: AtomicUsize,
    /// One more than the number of the page at which a parked handler is interrupted; 0 if none is parked.
    parked: AtomicU64,
    /// The pages to touch, once they are needed; `None` if there is no memory for them.
    pages: OnceLock<Option<OwnPages>>,
    /// Whether somebody else has touched one of them: no handler parks any more.
    spent: AtomicBool,
}

impl GateLock {
    /// Enters together with others, after a thread with priority.
    pub(crate) fn shared(&self) -> Gate<'_> {
        let enter = || if self.priority.load(Ordering::Relaxed) == 0 { self.lock.try_read() } else { None };
        // A parked handler leaves only when it is interrupted.
        let soon = || if self.parked.load(Ordering::Relaxed) == 0 { spin(enter) } else { None };
        enter().or_else(soon).unwrap_or_else(|| self.interrupt_and(RwLock::read))
    }

    /// Enters alone.
    pub(crate) fn alone(&self) -> Alone<'_> {
        self.lock.try_write().unwrap_or_else(|| self.interrupt_and(RwLock::write))
    }

    /// Enters alone as soon as those leave who are inside: a vCPU waits for a page.
    pub(crate) fn alone_with_priority(&self) -> Priority<'_> {
        self.priority.fetch_add(1, Ordering::Relaxed);
        self.lately.store(LATELY, Ordering::Relaxed);
        let alone = spin(|| self.lock.try_write()).unwrap_or_else(|| self.alone());
        Priority { gate: self, alone: Some(alone) }
    }

    /// Whether a reader had priority, not many questions ago.
    pub(crate) fn priority_lately(&self) -> bool {
        let left = self.lately.load(Ordering::Relaxed);
        // Approximate where several ask.
        self.lately.store(left.saturating_sub(1), Ordering::Relaxed);
        left > 0
    }

    /// A handler sees that the gate is wanted before it parks, or is seen to be parked and is interrupted.
    fn interrupt_and<'a, G>(&'a self, enter: impl FnOnce(&'a RwLock<Held>) -> G) -> G {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let parked_at = self.parked.load(Ordering::SeqCst).checked_sub(1);
        if let (Some(page), Some(Some(pages))) = (parked_at, self.pages.get()) {
            pages.touch(page);
        }
        let gate = enter(&self.lock);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        gate
    }

    /// Enters alone, to wait inside for a message; this page interrupts it. `None` if the gate is in use: the page may be
    /// spent then.
    ///
    /// One handler at a time may do so.
    pub(crate) fn park<'a>(&'a self, descriptor: &'a Descriptor, page: u64) -> Option<Parking<'a>> {
        let usable = page < INTERRUPTS && !self.spent.load(Ordering::Relaxed);
        self.pages.get_or_init(|| pages(descriptor)).as_ref().filter(|_| usable)?;
        let alone = self.lock.try_write()?;
        self.parked.store(page + 1, Ordering::SeqCst);
        let parking = Parking { gate: self, descriptor, alone: Some(alone) };
        (self.wanted.load(Ordering::SeqCst) == 0).then_some(parking)
    }

    /// Whether a fault at `addr` is an interruption, or at least a touch of such a page: its thread goes on.
    pub(crate) fn is_interruption(&self, descriptor: &Descriptor, addr: HostAddr) -> bool {
        let Some(Some(pages)) = self.pages.get() else { return false };
        let ours = pages.contain(addr);
        if ours && pages.answer_stray(descriptor, addr) {
            // That page interrupts nobody any more, and the others may be spent next.
            self.spent.store(true, Ordering::Relaxed);
        }
        ours
    }
}

/// The freeze under way that the gate knows of.
pub(crate) fn holder<'a>(gate: &'a Gate<'_>) -> Option<&'a dyn Holder> {
    gate.as_deref().filter(|holder| !holder.has_ended())
}

/// How many questions a reader's priority is remembered for.
const LATELY: usize = 256;

/// How long to look for the gate awake. An install takes less than that; waking a sleeping thread, on another core, takes
/// longer.
const SPIN: Duration = Duration::from_micros(50);

/// Looks again and again, but not for long: the thread that is waited for may need this core.
fn spin<T>(look: impl Fn() -> Option<T>) -> Option<T> {
    look().or_else(|| {
        let begun = Instant::now();
        std::iter::from_fn(|| (begun.elapsed() < SPIN).then(std::hint::spin_loop)).find_map(|()| look())
    })
}

/// Alone, to read what a vCPU waits for. Others wait awake.
#[derive(Debug)]
pub(crate) struct Priority<'a> {
    gate: &'a GateLock,
    alone: Option<Alone<'a>>,
}

impl<'a> Priority<'a> {
    pub(crate) fn alone(&self) -> Option<&Alone<'a>> {
        self.alone.as_ref()
    }
}

impl Drop for Priority<'_> {
    fn drop(&mut self) {
        self.alone = None;
        self.gate.priority.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The pages that interrupt a handler. Without them none parks.
fn pages(descriptor: &Descriptor) -> Option<OwnPages> {
    let pages = OwnPages::new(descriptor, PageCount(INTERRUPTS));
    pages.map_err(|error| log::debug!("no pages for interrupting a handler: {error}")).ok()
}

/// A handler is inside, alone, and waits for a message or is about to.
#[derive(Debug)]
pub(crate) struct Parking<'a> {
    gate: &'a GateLock,
    descriptor: &'a Descriptor,
    alone: Option<Alone<'a>>,
}

impl<'a> Parking<'a> {
    /// It has its message, and is still alone. Whether somebody wants in.
    pub(crate) fn ready(mut self) -> (Option<Alone<'a>>, bool) {
        let wanted = self.leave();
        (self.alone.take(), wanted)
    }

    /// Lets the interrupting threads go on to the gate itself, before anything else is done: they may hold locks.
    fn leave(&mut self) -> bool {
        let page = self.gate.parked.swap(0, Ordering::SeqCst).checked_sub(1);
        // A thread that still saw us parked is counted already.
        let wanted = self.gate.wanted.load(Ordering::SeqCst) > 0;
        if let (true, Some(page), Some(Some(pages))) = (wanted, page, self.gate.pages.get()) {
            pages.silence(self.descriptor, page);
        }
        wanted
    }
}

impl Drop for Parking<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Features;

    fn descriptor() -> Descriptor {
        Descriptor::create(Features::EVENT_REMOVE, Features::empty(), true).unwrap()
    }

    #[test]
    fn a_reader_with_priority_that_takes_long_stops_nobody() {
        let gate = GateLock::default();
        gate.priority.fetch_add(1, Ordering::Relaxed);
        drop(gate.shared());
        // And the other way round.
        let parking = gate.shared();
        std::thread::scope(|scope| {
            let priority = scope.spawn(|| assert!(gate.alone_with_priority().alone().is_some()));
            while gate.wanted.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            drop(parking);
            priority.join().unwrap();
        });
        assert_eq!(gate.priority.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn priority_is_remembered_for_a_while() {
        let gate = GateLock::default();
        assert!(!gate.priority_lately());
        drop(gate.alone_with_priority());
        assert_eq!((0..).take_while(|_| gate.priority_lately()).count(), LATELY);
    }

    /// A thread that wants in and saw nobody parked waits at the lock, and interrupts nobody.
    #[test]
    fn no_handler_parks_when_a_thread_wants_in() {
        testkit::require!(Userfaultfd);
        let (gate, descriptor) = (GateLock::default(), descriptor());
        gate.wanted.fetch_add(1, Ordering::SeqCst);
        assert!(gate.park(&descriptor, 0).is_none());
        assert_eq!(gate.parked.load(Ordering::SeqCst), 0);
        drop(gate.shared());
        gate.wanted.fetch_sub(1, Ordering::SeqCst);
        assert!(!gate.park(&descriptor, 1).unwrap().ready().1);
        assert!(gate.park(&descriptor, INTERRUPTS).is_none(), "there is no page for it");
    }

    /// A thread that saw it parked and has not touched the page yet finds ordinary memory there.
    #[test]
    fn an_interruption_that_comes_late_is_no_fault() {
        testkit::require!(Userfaultfd);
        let (gate, descriptor) = (GateLock::default(), descriptor());
        let parking = gate.park(&descriptor, 3).unwrap();
        gate.wanted.fetch_add(1, Ordering::SeqCst);
        let (alone, wanted) = parking.ready();
        assert!(wanted && alone.is_some());
        let pages = gate.pages.get().unwrap().as_ref().unwrap();
        pages.touch(3);
    }
}
