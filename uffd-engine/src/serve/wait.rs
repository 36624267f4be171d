//! How handlers wait for messages, and how they are stopped.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use page_units::HostAddr;

use super::doorbell::Doorbell;
use super::parked::Parked;
use crate::memory::Memory;
use crate::sys::abi::Message;

/// How handlers wait, and how they are stopped.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// In `read`; where events are read, in `poll` outside the gate or, see [`Parked`], in `read` inside it. A doorbell stops
    /// them.
    Bell(Doorbell),
    /// In `poll`; an event descriptor, which stays readable, stops them all. For memory of another process, in which
    /// there is no place for a doorbell.
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
    pub(crate) fn joining(&self, core: &Memory) {
        *core.handlers.lock() += 1;
        if let Waiter::Bell(bell) = self {
            bell.joining();
        }
    }

    /// A handler has ended, or did not start.
    pub(crate) fn left(&self, core: &Memory) {
        if let Waiter::Bell(bell) = self {
            bell.left(&core.descriptor);
        }
        *core.handlers.lock() -= 1;
    }

    /// Makes every handler end after the fault it is at.
    pub(crate) fn stop(&self) {
        match self {
            Waiter::Bell(bell) => bell.ring(),
            Waiter::Event(event) => {
                if let Err(errno) = event.write(1) {
                    log::error!("waking the fault handlers failed: {errno}");
                }
            }
            Waiter::Spin(stop) => stop.store(true, Ordering::Release),
        }
    }

    /// Whether a fault at `addr` is the doorbell, which is answered then.
    pub(crate) fn answers(&self, core: &Memory, addr: HostAddr) -> bool {
        matches!(self, Waiter::Bell(bell) if bell.answer(&core.descriptor, addr))
    }

    /// Waits for messages (not at all if `again`, since there is something to try again) and reads them. Events are
    /// read and applied while no install is under way.
    pub(crate) fn next(
        &self,
        core: &Memory,
        parked: &mut Parked,
        messages: &mut [Message],
        again: bool,
    ) -> Result<Woken, Errno> {
        match self {
            Waiter::Bell(_) if !core.gated() => {}
            Waiter::Bell(_) => match parked.read(core, messages, again) {
                Some(count) => return Ok(Woken::Messages(count?)),
                None if wait(core, None, again)? != Ready::Messages => return Ok(Woken::Messages(0)),
                None => {}
            },
            Waiter::Event(event) => match wait(core, Some(event.as_fd()), again)? {
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
                if core.gated() && wait(core, None, true)? != Ready::Messages {
                    return Ok(Woken::Messages(0));
                }
            }
        }
        Ok(Woken::Messages(core.read(messages)?))
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
fn wait(core: &Memory, stop: Option<BorrowedFd<'_>>, again: bool) -> Result<Ready, Errno> {
    let timeout = if again { PollTimeout::ZERO } else { PollTimeout::NONE };
    let uffd = core.descriptor.fd();
    let mut fds = [PollFd::new(uffd, PollFlags::POLLIN), PollFd::new(stop.unwrap_or(uffd), PollFlags::POLLIN)];
    let used = if stop.is_some() { 2 } else { 1 };
    match poll(&mut fds[..used], timeout) {
        Ok(_) if stop.is_some() && fds[1].any().unwrap_or(false) => Ok(Ready::Stop),
        Ok(_) if fds[0].any().unwrap_or(true) => Ok(Ready::Messages),
        Ok(_) | Err(Errno::EINTR) => Ok(Ready::Nothing),
        Err(errno) => Err(errno),
    }
}
