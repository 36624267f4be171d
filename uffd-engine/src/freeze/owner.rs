//! Who reads the page faults of frozen memory: the freeze itself, or the engine that is still loading it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Weak};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use page_source::{PageSource, Pages};
use page_units::{ByteLen, HostAddr};

use super::freeze::Shared;
use crate::load::fault::Origin;
use crate::load::status::Task;
use crate::memory::Memory;
use crate::memory::descriptor::Descriptor;
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
    Engine {
        core: Arc<Memory>,
        pages: Arc<dyn Pages>,
        /// The source, if it may be started again.
        again: Option<Arc<dyn PageSource>>,
        /// The engine's own flow: it ends with the engine.
        origin: Weak<Origin>,
    },
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // No more: an engine's core knows who freezes it.
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
            Owner::Engine { core, .. } => &core.descriptor,
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
            Owner::Engine { core, .. } => drop(core.installing()),
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
            // After it too: see `Memory::unregister`.
            Owner::Freeze { descriptor, .. } => {
                for zone in shared.zones.iter().filter(|zone| zone.registered.load(Ordering::Acquire)) {
                    let (start, len) = (zone.region.start, zone.region.len());
                    if let Err(error) = descriptor.unregister(start, len) {
                        log::debug!("unregistering {start} failed: {error}");
                    }
                    if let Err(error) = descriptor.wake(start, len) {
                        log::debug!("waking the waiters of {start} failed: {error}");
                    }
                }
            }
            // Where events are read nothing may wait for one: the supervisor does it.
            Owner::Engine { core, .. } if all_released => core.status.tell(Task::Check),
            Owner::Engine { core, .. } if core.on_reader_thread() => core.status.tell(Task::Thaw),
            Owner::Engine { core, .. } => {
                core.thaw(shared);
                core.status.tell(Task::Check);
            }
        }
    }

    /// Forgets the frozen memory, so that neither keeps the other alive.
    pub(crate) fn forget(&self, shared: &Arc<Shared>) {
        if let Owner::Engine { core, .. } = self {
            core.forget_freeze(shared);
        }
    }
}

/// So much is released by one call.
const STRIDE: ByteLen = ByteLen(1 << 30);

impl Memory {
    /// Takes the protection off, after a freeze has ended. What is protected all the same (an install that was under
    /// way) is released when it is written to.
    pub(crate) fn thaw(&self, shared: &Shared) {
        // Whoever serves a write for the freeze has seen by then that it has ended, or parked its writer, who is woken.
        drop(self.gate_alone());
        for zone in &shared.zones {
            let (mut at, end) = (zone.region.start.0, zone.region.range().end.0);
            while at < end {
                let next = (at + 1).next_multiple_of(STRIDE.0).min(end);
                if !self.release(shared, HostAddr(at), ByteLen(next - at)) {
                    return;
                }
                at = next;
            }
        }
    }

    /// `false` if the memory is not to be released any more: it is frozen again, or no longer this engine's.
    fn release(&self, shared: &Shared, start: HostAddr, len: ByteLen) -> bool {
        loop {
            let gate = self.installing();
            if gate.as_deref().is_some_and(|now| !std::ptr::eq(now, shared)) {
                return false;
            }
            match ops::write_protect(self.descriptor.fd(), start.0, len.0, false) {
                Ok(()) => return true,
                Err(Errno::EAGAIN) if self.status.running() => {}
                Err(errno) => {
                    log::debug!("releasing {len} bytes at {start} failed: {errno}");
                    return false;
                }
            }
            drop(gate);
            std::thread::yield_now();
        }
    }
}
