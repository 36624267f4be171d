//! Who reads the page faults of frozen memory: the freeze itself, or the engine that is still loading it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use page_units::{ByteLen, HostAddr};

use super::freeze::Shared;
use crate::memory::Memory;
use crate::memory::descriptor::Descriptor;
use crate::memory::holder::{Fetch, Holder};
use crate::sys::ops;

/// Who reads the page faults.
pub(crate) enum Owner {
    /// Threads of the freeze.
    Freeze {
        descriptor: Descriptor,
        /// Ends them.
        event: EventFd,
        /// Of each: odd from before it reads messages until it has looked at the discards among them.
        turns: Box<[AtomicU64]>,
    },
    /// An engine whose regions are the zones, in the same order.
    Engine { memory: Arc<Memory>, fetch: Arc<dyn Fetch> },
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No more: an engine's memory knows what freezes it.
        f.write_str(match self {
            Owner::Freeze { .. } => "Freeze",
            Owner::Engine { .. } => "Engine",
        })
    }
}

impl Owner {
    pub(crate) fn freeze(descriptor: Descriptor, handlers: usize) -> nix::Result<Owner> {
        let turns = std::iter::repeat_with(AtomicU64::default).take(handlers).collect();
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Owner::Freeze { descriptor, event, turns })
    }

    pub(crate) fn descriptor(&self) -> &Descriptor {
        match self {
            Owner::Freeze { descriptor, .. } => descriptor,
            Owner::Engine { memory, .. } => &memory.view.descriptor,
        }
    }

    /// A handler of the freeze begins, or ends, to read messages and to look at the discards among them.
    pub(crate) fn turn(&self, handler: usize) {
        if let Owner::Freeze { turns, .. } = self {
            turns[handler].fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Waits until every discard that may have taken effect is known, or `stopping`. The kernel lets memory go as soon
    /// as a handler has read of it: what was copied, or found missing, after that is not what it was at the freeze
    /// point. So whoever has claimed a granule calls this after looking at it and before declaring it saved; a discard
    /// that is noticed until then fails the snapshot.
    ///
    /// Whoever holds the engine's gate needs it not: no discard is read meanwhile.
    pub(crate) fn settle(&self, stopping: impl Fn() -> bool) {
        fence(Ordering::SeqCst);
        match self {
            Owner::Freeze { turns, .. } => {
                for turn in turns {
                    let now = turn.load(Ordering::SeqCst);
                    while now % 2 == 1 && turn.load(Ordering::SeqCst) == now && !stopping() {
                        std::thread::yield_now();
                    }
                }
            }
            Owner::Engine { memory, .. } => drop(memory.view.installing()),
        }
    }

    /// Ends the threads of the freeze.
    pub(crate) fn stop(&self) {
        if let Owner::Freeze { event, .. } = self
            && let Err(errno) = event.write(1)
        {
            log::error!("waking the fault handlers failed: {errno}");
        }
    }

    /// Takes the protection off everything that is not released, wakes whoever waits, and lets an engine go on to its
    /// completion.
    pub(crate) fn let_go(&self, shared: &Shared, all_released: bool) {
        match self {
            Owner::Freeze { descriptor, .. } => {
                for zone in shared.zones.iter().filter(|zone| zone.registered.load(Ordering::Acquire)) {
                    descriptor.let_go(zone.region.start, zone.region.len());
                }
            }
            // Where events are read nothing may wait for one: the supervisor does it.
            Owner::Engine { fetch, .. } if all_released => fetch.freeze_ended(false),
            Owner::Engine { memory, fetch } if memory.view.on_reader_thread() => fetch.freeze_ended(true),
            Owner::Engine { memory, fetch } => {
                thaw(memory, &**fetch, shared);
                fetch.freeze_ended(false);
            }
        }
    }

    /// Forgets the frozen memory, so that neither keeps the other alive.
    pub(crate) fn forget(&self, shared: &Arc<Shared>) {
        if let Owner::Engine { memory, .. } = self {
            let holder: Arc<dyn Holder> = Arc::<Shared>::clone(shared);
            memory.view.forget_freeze(&holder);
        }
    }
}

/// So much is released by one call.
const STRIDE: ByteLen = ByteLen(1 << 30);

/// Takes the protection off, after a freeze has ended. What is protected all the same (an install that was under way) is
/// released when it is written to.
pub(super) fn thaw(memory: &Memory, fetch: &dyn Fetch, shared: &Shared) {
    // A handler that serves a write for the freeze has seen by then that it has ended, or parked its writer, who is woken.
    drop(memory.view.gate_alone());
    for zone in &shared.zones {
        let (mut at, end) = (zone.region.start.0, zone.region.range().end.0);
        while at < end {
            let next = (at + 1).next_multiple_of(STRIDE.0).min(end);
            if !release(memory, fetch, shared, HostAddr(at), ByteLen(next - at)) {
                return;
            }
            at = next;
        }
    }
}

/// `false` if the memory is not to be released any more: it is frozen again, or no longer this engine's.
fn release(memory: &Memory, fetch: &dyn Fetch, shared: &Shared, start: HostAddr, len: ByteLen) -> bool {
    loop {
        let gate = memory.view.installing();
        if gate.as_deref().is_some_and(|now| !std::ptr::addr_eq(now, shared)) {
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
