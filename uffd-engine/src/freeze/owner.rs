//! Who reads the page faults of frozen memory: the freeze itself, or the engine that is still loading it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use page_units::{ByteLen, HostAddr};

use super::zone::Zone;
use crate::OpenError;
use crate::memory::Memory;
use crate::memory::descriptor::Descriptor;
use crate::memory::holder::{Fetch, Holder};
use crate::sys::abi::Features;
use crate::sys::ops;

/// The descriptor and the threads of a freeze of its own.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) descriptor: Descriptor,
    /// Ends the threads.
    pub(crate) event: EventFd,
    /// Of each: odd from before it reads messages until it has looked at the discards among them.
    turns: Box<[AtomicU64]>,
    needed: AtomicBool,
}

/// Who reads the page faults.
pub(crate) enum Owner {
    /// Threads of the freeze.
    Freeze(Own),
    /// An engine whose regions are the zones, in the same order, unless it becomes complete before the freeze point and
    /// hands the memory over.
    Engine { memory: Arc<Memory>, fetch: Arc<dyn Fetch>, heir: Result<Own, OpenError>, handed_over: AtomicBool },
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No more: an engine's memory knows what freezes it.
        f.write_str(match self {
            Owner::Freeze(_) => "Freeze",
            Owner::Engine { .. } => "Engine",
        })
    }
}

/// Who reads the page faults at present.
#[derive(Clone, Copy)]
pub(crate) enum By<'a> {
    Freeze(&'a Own),
    Engine { memory: &'a Memory, fetch: &'a dyn Fetch },
}

impl Own {
    pub(crate) fn new(features: Features, handlers: usize) -> Result<Own, OpenError> {
        let descriptor = Descriptor::create(features, Features::empty(), true)?;
        let turns = std::iter::repeat_with(AtomicU64::default).take(handlers).collect();
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let event = event.map_err(|errno| OpenError::Handshake(errno.into()))?;
        Ok(Own { descriptor, event, turns, needed: AtomicBool::new(true) })
    }

    /// A handler begins, or ends, to read messages and to look at the discards among them.
    pub(crate) fn turn(&self, handler: usize) {
        self.turns[handler].fetch_add(1, Ordering::SeqCst);
    }

    /// Whether the threads have something to do, or may have yet.
    pub(crate) fn needed(&self) -> bool {
        self.needed.load(Ordering::Acquire)
    }

    /// Ends the threads.
    pub(crate) fn dismiss(&self) {
        self.needed.store(false, Ordering::Release);
        if let Err(errno) = self.event.write(1) {
            log::error!("waking the fault handlers failed: {errno}");
        }
    }
}

impl Owner {
    pub(crate) fn by(&self) -> By<'_> {
        match self {
            Owner::Freeze(own) => By::Freeze(own),
            Owner::Engine { heir: Ok(own), handed_over, .. } if handed_over.load(Ordering::Acquire) => By::Freeze(own),
            Owner::Engine { memory, fetch, .. } => By::Engine { memory, fetch: &**fetch },
        }
    }

    /// The freeze's own threads, if there are any.
    pub(crate) fn own(&self) -> Option<&Own> {
        match self {
            Owner::Freeze(own) | Owner::Engine { heir: Ok(own), .. } => Some(own),
            Owner::Engine { heir: Err(_), .. } => None,
        }
    }

    pub(crate) fn descriptor(&self) -> &Descriptor {
        match self.by() {
            By::Freeze(own) => &own.descriptor,
            By::Engine { memory, .. } => &memory.view.descriptor,
        }
    }

    /// Waits until every discard that may have taken effect is known, or `stopping`. The kernel lets memory go as soon
    /// as a handler has read of it: what was copied, or found missing, after that is not what it was at the freeze
    /// point. So a thread that has claimed a granule calls this after looking at it and before declaring it saved; a discard
    /// that is noticed until then fails the snapshot.
    ///
    /// A thread that holds the engine's gate need not call it: no discard is read meanwhile.
    pub(crate) fn settle(&self, stopping: impl Fn() -> bool) {
        fence(Ordering::SeqCst);
        match self.by() {
            By::Freeze(own) => {
                for turn in &own.turns {
                    let now = turn.load(Ordering::SeqCst);
                    while now % 2 == 1 && turn.load(Ordering::SeqCst) == now && !stopping() {
                        std::thread::yield_now();
                    }
                }
            }
            By::Engine { memory, .. } => drop(memory.view.installing()),
        }
    }

    /// Ends the threads of the freeze.
    pub(crate) fn stop(&self) {
        if let Some(own) = self.own() {
            own.dismiss();
        }
    }

    /// Takes the protection off everything that is not released, wakes its waiters, and lets an engine go on to its
    /// completion.
    pub(crate) fn let_go(&self, zones: &[Zone], freeze: &dyn Holder, all_released: bool) {
        match self.by() {
            By::Freeze(own) => {
                for zone in zones.iter().filter(|zone| zone.registered.load(Ordering::Acquire)) {
                    own.descriptor.let_go(zone.region.start, zone.region.len());
                }
            }
            // Where events are read nothing may wait for one: the supervisor does it.
            By::Engine { fetch, .. } if all_released => fetch.freeze_ended(false),
            By::Engine { memory, fetch } if memory.view.on_reader_thread() => fetch.freeze_ended(true),
            By::Engine { memory, fetch } => {
                thaw(memory, fetch, zones, freeze);
                fetch.freeze_ended(false);
            }
        }
    }

    /// Forgets the frozen memory, so that neither keeps the other alive.
    pub(crate) fn forget(&self, freeze: &Arc<dyn Holder>) {
        if let By::Engine { memory, .. } = self.by() {
            memory.view.forget_freeze(freeze);
        }
    }
}

/// How much is released by one call.
const STRIDE: ByteLen = ByteLen(1 << 30);

/// Takes the protection off, after a freeze has ended. What is protected all the same (an install that was under way) is
/// released when it is written to.
pub(super) fn thaw(memory: &Memory, fetch: &dyn Fetch, zones: &[Zone], freeze: &dyn Holder) {
    // A handler that serves a write for the freeze has seen by then that it has ended, or parked its writer, who is woken.
    drop(memory.view.gate_alone());
    for zone in zones {
        let (mut at, end) = (zone.region.start.0, zone.region.range().end.0);
        while at < end {
            let next = (at + 1).next_multiple_of(STRIDE.0).min(end);
            if !release(memory, fetch, freeze, HostAddr(at), ByteLen(next - at)) {
                return;
            }
            at = next;
        }
    }
}

/// `false` if the memory is not to be released any more: it is frozen again, or no longer this engine's.
fn release(memory: &Memory, fetch: &dyn Fetch, freeze: &dyn Holder, start: HostAddr, len: ByteLen) -> bool {
    loop {
        let gate = memory.view.installing();
        if gate.as_deref().is_some_and(|now| !std::ptr::addr_eq(now, freeze)) {
            return false;
        }
        match ops::write_protect(memory.view.descriptor.fd(), start.0, len.0, false) {
            Ok(()) => return true,
            Err(Errno::EAGAIN) if fetch.running() => {}
            Err(errno) => {
                log::debug!("releasing {len} bytes at {start} failed: {errno}");
                return false;
            }
        }
        drop(gate);
        std::thread::yield_now();
    }
}
