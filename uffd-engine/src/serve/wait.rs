//! How handlers wait for messages, and how they are stopped.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use page_units::HostAddr;

use super::events;
use super::served::Served;
use super::stop::{StopPages, Touch};
use crate::memory::Memory;
use crate::memory::gate::INTERRUPTS;
use crate::pause::PausePoint;
use crate::sys::abi::Message;

/// How handlers wait, and how they are stopped.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// In `read`; where events are read, in `poll` outside the gate or, see [`Patience`], parked in `read` inside it.
    Read(StopPages),
    /// In `poll`; an event descriptor, which stays readable, stops them all. For memory of another process, in which
    /// there is no place for pages of our own.
    Event(EventFd),
    /// Not at all.
    Spin(AtomicBool),
}

/// What a handler was woken for.
pub(crate) enum Woken {
    Messages(usize),
    Stop,
}

impl Waiter {
    pub(crate) fn event() -> nix::Result<Waiter> {
        Ok(Waiter::Event(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// A handler is about to start.
    pub(crate) fn joining(&self, memory: &Memory) {
        *memory.view.handlers.lock() += 1;
        if let Waiter::Read(pages) = self {
            pages.joining();
        }
    }

    /// A handler has ended, or did not start.
    pub(crate) fn left(&self, memory: &Memory) {
        if let Waiter::Read(pages) = self {
            pages.left(&memory.view.descriptor);
        }
        *memory.view.handlers.lock() -= 1;
    }

    /// Makes every handler end after the fault it is at.
    pub(crate) fn stop(&self, memory: &Memory) {
        match self {
            Waiter::Read(pages) => pages.stop(&memory.view.descriptor),
            Waiter::Event(event) => {
                if let Err(errno) = event.write(1) {
                    log::error!("waking the fault handlers failed: {errno}");
                }
            }
            Waiter::Spin(stop) => stop.store(true, Ordering::Release),
        }
    }

    /// What a fault at `addr` is to the pages that stop handlers; it is answered if it is one of theirs.
    pub(crate) fn touch(&self, memory: &Memory, addr: HostAddr) -> Touch {
        match self {
            Waiter::Read(pages) => pages.answer(&memory.view.descriptor, addr),
            Waiter::Event(_) | Waiter::Spin(_) => Touch::None,
        }
    }

    /// Waits for messages (not at all if `again`, since there is something to try again) and reads them. Events are
    /// read and applied while no install is under way.
    pub(crate) fn next(
        &self,
        served: &dyn Served,
        patience: &mut Patience,
        messages: &mut [Message],
        again: bool,
    ) -> Result<Woken, Errno> {
        let memory = &**served.memory();
        match self {
            Waiter::Read(_) if !memory.view.gated() => {}
            Waiter::Read(_) => match patience.read(served, messages, again) {
                Some(count) => return Ok(Woken::Messages(count?)),
                None if wait(memory, None, again)? != Ready::Messages => return Ok(Woken::Messages(0)),
                None => {}
            },
            Waiter::Event(event) => match wait(memory, Some(event.as_fd()), again)? {
                Ready::Stop => return Ok(Woken::Stop),
                Ready::Nothing => return Ok(Woken::Messages(0)),
                Ready::Messages => {}
            },
            Waiter::Spin(stop) => {
                if stop.load(Ordering::Acquire) {
                    return Ok(Woken::Stop);
                }
                std::hint::spin_loop();
                // Not through the gate for nothing.
                if memory.view.gated() && wait(memory, None, true)? != Ready::Messages {
                    return Ok(Woken::Messages(0));
                }
            }
        }
        Ok(Woken::Messages(events::read(memory, served, messages)?))
    }
}

/// What a poll says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    Nothing,
    Messages,
    Stop,
}

/// Waits until there is a message (not at all if `again`), or it is time to stop.
fn wait(memory: &Memory, stop: Option<BorrowedFd<'_>>, again: bool) -> Result<Ready, Errno> {
    let timeout = if again { PollTimeout::ZERO } else { PollTimeout::NONE };
    let uffd = memory.view.descriptor.fd();
    let mut fds = [PollFd::new(uffd, PollFlags::POLLIN), PollFd::new(stop.unwrap_or(uffd), PollFlags::POLLIN)];
    let used = if stop.is_some() { 2 } else { 1 };
    match poll(&mut fds[..used], timeout) {
        Ok(_) if stop.is_some() && fds[1].any().unwrap_or(false) => Ok(Ready::Stop),
        Ok(_) if fds[0].any().unwrap_or(true) => Ok(Ready::Messages),
        Ok(_) | Err(Errno::EINTR) => Ok(Ready::Nothing),
        Err(errno) => Err(errno),
    }
}

/// After how many reads, all undisturbed, a handler parks: nobody seems to install but itself. Twice as many after each
/// time it was interrupted.
const READS: u32 = 8;

/// When the only handler of an engine parks: waits for its messages inside the gate.
#[derive(Debug)]
pub(crate) struct Patience {
    /// How often it may still be interrupted: never, if there are other handlers.
    left: u64,
    /// How many reads went by undisturbed, and how many have to.
    quiet: u32,
    patience: u32,
    /// Whether the descriptor is blocking: it is only while this handler uses it so.
    blocking: bool,
}

impl Patience {
    /// `alone`: no other handler reads.
    pub(crate) fn new(alone: bool) -> Patience {
        Patience { left: if alone { INTERRUPTS } else { 0 }, quiet: 0, patience: READS, blocking: false }
    }

    /// Parks, reads and applies what comes. `None` if that is not for now: the descriptor does not block then.
    pub(crate) fn read(
        &mut self,
        served: &dyn Served,
        messages: &mut [Message],
        again: bool,
    ) -> Option<Result<usize, Errno>> {
        let memory = &**served.memory();
        if again || !self.in_peace() {
            return self.outside(memory);
        }
        let Some(parking) = memory.view.gate.park(&memory.view.descriptor, INTERRUPTS - self.left) else {
            self.disturbed();
            return self.outside(memory);
        };
        if !self.blocking {
            if let Err(errno) = memory.view.descriptor.set_blocking(true) {
                return Some(Err(errno));
            }
            self.blocking = true;
        }
        memory.pauses.at(PausePoint::WaitsInside);
        let read = events::receive(memory, messages);
        let (alone, wanted) = parking.ready();
        if wanted {
            self.disturbed();
        }
        Some(read.inspect(|&count| events::apply(memory, served, alone.as_ref(), &messages[..count])))
    }

    /// Whether to park for the next read.
    fn in_peace(&mut self) -> bool {
        let peace = self.left > 0 && self.quiet >= self.patience;
        self.quiet = self.quiet.saturating_add(1);
        peace
    }

    fn disturbed(&mut self) {
        self.quiet = 0;
        self.patience = self.patience.saturating_mul(2);
        self.left = self.left.saturating_sub(1);
    }

    /// From now on a read must not block.
    fn outside(&mut self, memory: &Memory) -> Option<Result<usize, Errno>> {
        if self.blocking {
            self.blocking = false;
            return memory.view.descriptor.set_blocking(false).err().map(Err);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_parks_less_and_less_often_and_in_the_end_no_more() {
        let mut patience = Patience::new(true);
        let mut peace = 8;
        for _ in 0..INTERRUPTS {
            assert_eq!((0..).take_while(|_| !patience.in_peace()).count(), peace);
            assert!(patience.in_peace());
            patience.disturbed();
            peace *= 2;
        }
        assert!((0..1 << 20).all(|_| !patience.in_peace()));
        assert!((0..100).all(|_| !Patience::new(false).in_peace()));
    }
}
