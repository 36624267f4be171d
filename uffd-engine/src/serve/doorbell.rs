//! Waking handlers that block in `read` on the userfaultfd.
//!
//! Nothing but a message ends that read, so stopping makes one: each handler has a scratch page that is registered like
//! guest memory, and touching it is a page fault. No signal handler, no second descriptor, no extra system call for
//! each fault.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use page_units::{ByteLen, HostAddr, PAGE_SIZE};
use userfaultfd::RegisterMode;

use crate::memory::descriptor::Descriptor;
use crate::sys::memory::Scratch;
use crate::sys::ops::{self, Done};

#[derive(Debug)]
pub(crate) struct Doorbell {
    pages: Vec<Scratch>,
    alive: AtomicUsize,
    rung: AtomicBool,
}

const PAGE: ByteLen = ByteLen(PAGE_SIZE);

impl Doorbell {
    /// A doorbell for so many handlers.
    pub(crate) fn new(descriptor: &Descriptor, handlers: usize) -> io::Result<Doorbell> {
        let pages = (0..handlers).map(|_| Scratch::missing(PAGE)).collect::<io::Result<Vec<_>>>()?;
        for page in &pages {
            descriptor.register(page.addr(), PAGE, RegisterMode::MISSING).map_err(io::Error::other)?;
        }
        Ok(Doorbell { pages, alive: AtomicUsize::new(0), rung: AtomicBool::new(false) })
    }

    /// Whether a fault at `addr` is the bell: it is answered, and the handler that read it ends.
    pub(crate) fn answer(&self, descriptor: &Descriptor, addr: HostAddr) -> bool {
        let Some(page) = self.pages.iter().find(|page| page.addr() == addr) else { return false };
        // Refused while a discard is not read yet, and the handler that has heard the bell reads no more.
        if ops::zeropage(descriptor.fd(), page.addr().0, PAGE.0) != Done::All {
            descriptor.silence(page.addr(), PAGE);
        }
        true
    }

    /// Ends every handler that still runs. Returns when each of them has heard it.
    pub(crate) fn ring(&self) {
        if self.rung.swap(true, Ordering::AcqRel) {
            return;
        }
        for page in self.pages.iter().take(self.alive.load(Ordering::Acquire)) {
            // With no handler left the pages are ordinary memory (see `left`).
            page.touch(ByteLen(0));
        }
    }

    /// A handler is about to start.
    pub(crate) fn joining(&self) {
        self.alive.fetch_add(1, Ordering::AcqRel);
    }

    /// A handler has ended, for whatever reason. The last one leaves nobody waiting.
    pub(crate) fn left(&self, descriptor: &Descriptor) {
        if self.alive.fetch_sub(1, Ordering::AcqRel) == 1 {
            for page in &self.pages {
                descriptor.silence(page.addr(), PAGE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::unistd::gettid;

    use super::*;
    use crate::Features;
    use crate::sys::abi::Message;
    use crate::sys::memory::give_back;

    /// The kernel fills no page while a discard is unread: whoever rings must not be left behind.
    #[test]
    fn it_is_heard_while_a_discard_is_unread() {
        testkit::require!(Userfaultfd);
        let descriptor = Descriptor::create(Features::EVENT_REMOVE, Features::empty(), true).unwrap();
        let bell = Doorbell::new(&descriptor, 1).unwrap();
        let memory = Scratch::new(PAGE).unwrap();
        descriptor.register(memory.addr(), PAGE, RegisterMode::MISSING).unwrap();
        bell.joining();
        let readable = || poll(&mut [PollFd::new(descriptor.fd(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        let mut messages = [Message::default(); 8];
        std::thread::scope(|scope| {
            let discarding = scope.spawn(|| give_back(memory.addr(), PAGE, false).unwrap());
            readable();
            let (tell, heard) = channel();
            let (tell_id, id) = channel();
            let bell = &bell;
            scope.spawn(move || {
                tell_id.send(gettid()).unwrap();
                bell.ring();
                tell.send(()).unwrap();
            });
            let place = format!("/proc/self/task/{}/wchan", id.recv().unwrap());
            while std::fs::read_to_string(&place).unwrap() != "handle_userfault" {
                std::thread::yield_now();
            }
            // Faults are read before events: the ring alone, if there is room for one message.
            assert_eq!(ops::read(descriptor.fd(), &mut messages[..1]), Ok(1));
            assert!(bell.answer(&descriptor, HostAddr(messages[0].word1)));
            let rung = heard.recv_timeout(Duration::from_secs(20));
            assert!(!discarding.is_finished(), "its event is unread");
            // Lets everybody go, whatever happened.
            assert_eq!(ops::read(descriptor.fd(), &mut messages), Ok(1));
            bell.left(&descriptor);
            rung.unwrap();
        });
    }
}
