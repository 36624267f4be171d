//! Stopping handlers that block in `read` on the userfaultfd. Nothing but a message ends that read, so stopping makes one.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use page_units::{HostAddr, PageCount};

use crate::memory::descriptor::Descriptor;
use crate::memory::own_pages::OwnPages;

/// One page for each handler.
#[derive(Debug)]
pub(crate) struct StopPages {
    pages: OwnPages,
    alive: AtomicU64,
    stopped: AtomicBool,
}

impl StopPages {
    pub(crate) fn new(descriptor: &Descriptor, handlers: usize) -> io::Result<StopPages> {
        let pages = OwnPages::new(descriptor, PageCount(handlers as u64))?;
        Ok(StopPages { pages, alive: AtomicU64::new(0), stopped: AtomicBool::new(false) })
    }

    /// Whether a fault at `addr` is one of them: it is answered, and the handler that read it ends.
    pub(crate) fn answer(&self, descriptor: &Descriptor, addr: HostAddr) -> bool {
        let ours = self.pages.contain(addr);
        if ours {
            self.pages.answer(descriptor, addr);
        }
        ours
    }

    /// Ends every handler that still runs. Returns when each of them knows.
    pub(crate) fn stop(&self) {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return;
        }
        // With no handler left the pages are ordinary memory (see `left`).
        (0..self.alive.load(Ordering::Acquire)).for_each(|page| self.pages.touch(page));
    }

    /// A handler is about to start.
    pub(crate) fn joining(&self) {
        self.alive.fetch_add(1, Ordering::AcqRel);
    }

    /// A handler has ended, for whatever reason. The last one leaves nobody waiting.
    pub(crate) fn left(&self, descriptor: &Descriptor) {
        if self.alive.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.pages.silence_all(descriptor);
        }
    }
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
            let pages = &pages;
            scope.spawn(move || {
                tell_id.send(gettid()).unwrap();
                pages.stop();
                tell.send(()).unwrap();
            });
            let place = format!("/proc/self/task/{}/wchan", id.recv().unwrap());
            while std::fs::read_to_string(&place).unwrap() != "handle_userfault" {
                std::thread::yield_now();
            }
            // Faults are read before events: the stop alone, if there is space for one message.
            assert_eq!(ops::read(descriptor.fd(), &mut messages[..1]), Ok(1));
            assert!(pages.answer(&descriptor, HostAddr(messages[0].word1)));
            let stopped = heard.recv_timeout(Duration::from_secs(20));
            assert!(!discarding.is_finished(), "its event is unread");
            // Lets everybody go, whatever happened.
            assert_eq!(ops::read(descriptor.fd(), &mut messages), Ok(1));
            pages.left(&descriptor);
            stopped.unwrap();
        });
    }
}
