//! Stopping handlers that block in `read` on the userfaultfd. Nothing but a message ends that read, so stopping makes one.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use page_units::{HostAddr, PageCount};
use parking_lot::Mutex;

use crate::memory::descriptor::Descriptor;
use crate::memory::own_pages::OwnPages;

/// One page for each handler.
#[derive(Debug)]
pub(crate) struct StopPages {
    pages: OwnPages,
    /// How many handlers there are. Held while the pages are silenced or made missing again.
    alive: Mutex<u64>,
    stopped: AtomicBool,
    /// Whether somebody else has touched a page, which stops nobody then.
    strayed: AtomicBool,
}

impl StopPages {
    pub(crate) fn new(descriptor: &Descriptor, handlers: usize) -> io::Result<StopPages> {
        let pages = OwnPages::new(descriptor, PageCount(handlers as u64))?;
        let (stopped, strayed) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(StopPages { pages, alive: Mutex::new(0), stopped, strayed })
    }

    /// Whether a fault at `addr` is one of them, and what it means. Its thread goes on.
    pub(crate) fn answer(&self, descriptor: &Descriptor, addr: HostAddr) -> Touch {
        if !self.pages.contain(addr) {
            return Touch::None;
        }
        let before = self.stopped.load(Ordering::SeqCst);
        if !before {
            self.strayed.store(true, Ordering::SeqCst);
        }
        self.pages.answer(descriptor, addr);
        // The answer may have gone to the stopping thread as well, which then waits for no other handler.
        if before || self.stopped.load(Ordering::SeqCst) { Touch::Stop } else { Touch::Stray }
    }

    /// Ends every handler that still runs. Returns when each of them knows.
    pub(crate) fn stop(&self, descriptor: &Descriptor) {
        if self.stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        // With no handler left the pages are ordinary memory (see `left`).
        let alive = *self.alive.lock();
        (0..alive).for_each(|page| self.pages.touch(page));
        while self.strayed.load(Ordering::SeqCst) && self.renew(descriptor) {
            self.pages.touch(0);
        }
    }

    /// Makes the pages missing again, for the handlers that are left; `false` if there are none.
    fn renew(&self, descriptor: &Descriptor) -> bool {
        let alive = self.alive.lock();
        if *alive == 0 {
            return false;
        }
        if let Err(error) = self.pages.renew(descriptor) {
            log::error!("the pages that stop fault handlers can't be made missing again: {error}");
            return false;
        }
        true
    }

    /// A handler is about to start.
    pub(crate) fn joining(&self) {
        *self.alive.lock() += 1;
    }

    /// A handler has ended, for whatever reason. The last one leaves nobody waiting.
    pub(crate) fn left(&self, descriptor: &Descriptor) {
        let mut alive = self.alive.lock();
        *alive -= 1;
        if *alive == 0 {
            self.pages.silence_all(descriptor);
        }
    }
}

/// What a fault is to the pages that stop handlers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// It is elsewhere.
    None,
    /// The handler that read it ends.
    Stop,
    /// Somebody else has touched a page: a debugger, `mlockall`, a reader of all memory.
    Stray,
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::gettid;

    use page_units::{ByteLen, PAGE_SIZE};
    use userfaultfd::RegisterMode;

    use super::*;
    use crate::Features;
    use crate::sys::abi::Message;
    use crate::sys::memory::{Scratch, give_back};
    use crate::sys::ops;

    /// The kernel fills no page while a discard is unread: the stopping thread must not be left behind.
    #[test]
    fn handlers_are_stopped_while_a_discard_is_unread() {
        const PAGE: ByteLen = ByteLen(PAGE_SIZE);
        testkit::require!(Userfaultfd);
        let descriptor = Descriptor::create(Features::EVENT_REMOVE, Features::empty(), true).unwrap();
        let pages = StopPages::new(&descriptor, 1).unwrap();
        let memory = Scratch::new(PAGE).unwrap();
        descriptor.register(memory.addr(), PAGE, RegisterMode::MISSING).unwrap();
        pages.joining();
        let readable = || poll(&mut [PollFd::new(descriptor.fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        let mut messages = [Message::default(); 8];
        std::thread::scope(|scope| {
            let discarding = scope.spawn(|| give_back(memory.addr(), PAGE, false).unwrap());
            readable();
            let (tell, heard) = channel();
            let (tell_id, id) = channel();
            let (pages, descriptor) = (&pages, &descriptor);
            scope.spawn(move || {
                tell_id.send(gettid()).unwrap();
                pages.stop(descriptor);
                tell.send(()).unwrap();
            });
            let place = format!("/proc/self/task/{}/wchan", id.recv().unwrap());
            while std::fs::read_to_string(&place).unwrap() != "handle_userfault" {
                std::thread::yield_now();
            }
            // Faults are read before events: the stop alone, if there is space for one message.
            assert_eq!(ops::read(descriptor.fd(), &mut messages[..1]), Ok(1));
            assert_eq!(pages.answer(descriptor, HostAddr(messages[0].word1)), Touch::Stop);
            let stopped = heard.recv_timeout(Duration::from_secs(20));
            assert!(!discarding.is_finished(), "its event is unread");
            // Lets everybody go, whatever happened.
            assert_eq!(ops::read(descriptor.fd(), &mut messages), Ok(1));
            pages.left(descriptor);
            stopped.unwrap();
        });
    }
}
