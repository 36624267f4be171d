//! Waking handlers that block in `read` on the userfaultfd.
//!
//! Nothing but a message ends that read, so stopping makes one: each handler has a scratch page that is registered like
//! guest memory, and touching it is a page fault. No signal handler, no second descriptor, no extra system call for
//! each fault.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use page_source::{ByteLen, HostAddr, PAGE_SIZE};
use userfaultfd::RegisterMode;

use crate::descriptor::Descriptor;
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
        let pages = (0..handlers).map(|_| Scratch::new(PAGE)).collect::<io::Result<Vec<_>>>()?;
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
            silence(descriptor, page);
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
                silence(descriptor, page);
            }
        }
    }
}

/// The page is ordinary memory from now on, and nobody waits for it. Woken last: see `Core::unregister`.
fn silence(descriptor: &Descriptor, page: &Scratch) {
    for done in [descriptor.unregister(page.addr(), PAGE), descriptor.wake(page.addr(), PAGE)] {
        if let Err(error) = done {
            log::debug!("silencing the doorbell of a fault handler failed: {error}");
        }
    }
}
