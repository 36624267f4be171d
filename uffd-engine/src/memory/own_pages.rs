//! Pages of the engine's own, registered like guest memory: touching one is a page fault, and so a message to a handler
//! that waits in `read`. No signal handler, no second descriptor, no extra system call for each fault.

use std::io;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, PAGE_SIZE, PageCount};
use userfaultfd::RegisterMode;

use super::descriptor::Descriptor;
use crate::sys::memory::Scratch;
use crate::sys::ops::{self, Done};

const PAGE: ByteLen = ByteLen(PAGE_SIZE);

/// Each page serves once: to make it missing again would be a discard, with an event of its own.
#[derive(Debug)]
pub(crate) struct OwnPages {
    memory: Scratch,
    pages: PageCount,
}

impl OwnPages {
    pub(crate) fn new(descriptor: &Descriptor, pages: PageCount) -> io::Result<OwnPages> {
        let memory = Scratch::missing(pages.to_bytes())?;
        descriptor.register(memory.addr(), pages.to_bytes(), RegisterMode::MISSING)?;
        Ok(OwnPages { memory, pages })
    }

    /// Whether an address is in one of them.
    pub(crate) fn contain(&self, addr: HostAddr) -> bool {
        let start = self.memory.addr();
        (start..start + self.pages.to_bytes()).contains(&addr)
    }

    /// The caller goes on when a handler has answered; at once if the page is ordinary memory by now.
    pub(crate) fn touch(&self, page: u64) {
        self.memory.touch(PageCount(page).to_bytes());
    }

    /// Lets the toucher of a page go on.
    pub(crate) fn answer(&self, descriptor: &Descriptor, addr: HostAddr) {
        let page = HostAddr(addr.0 - addr.0 % PAGE_SIZE);
        // Refused while a discard is not read yet, and the handler that was stopped by it reads no more.
        if ops::zeropage(descriptor.fd(), page.0, PAGE.0) != Done::All {
            descriptor.let_go(page, PAGE);
        }
    }

    /// Answers a touch that nobody here made: by a debugger, by `mlockall`, by a reader of all memory. Whether it was one,
    /// and has spent its page; the touch of a page that was silenced before goes on already.
    pub(crate) fn answer_stray(&self, descriptor: &Descriptor, addr: HostAddr) -> bool {
        let page = HostAddr(addr.0 - addr.0 % PAGE_SIZE);
        match ops::zeropage(descriptor.fd(), page.0, PAGE.0) {
            Done::Failed(Errno::ENOENT) => false,
            Done::All => true,
            _ => {
                descriptor.let_go(page, PAGE);
                true
            }
        }
    }

    /// Makes all of them missing again, spent or not. What touches one meanwhile finds ordinary memory.
    ///
    /// # Errors
    /// The system's: they are ordinary memory then.
    pub(crate) fn renew(&self, descriptor: &Descriptor) -> io::Result<()> {
        let (start, len) = (self.memory.addr(), self.pages.to_bytes());
        self.silence_all(descriptor);
        // Not registered, so that this is no discard with an event.
        self.memory.empty()?;
        descriptor.register(start, len, RegisterMode::MISSING)
    }

    /// From now on a page is ordinary memory, and nobody waits there.
    pub(crate) fn silence(&self, descriptor: &Descriptor, page: u64) {
        descriptor.let_go(self.memory.addr() + PageCount(page).to_bytes(), PAGE);
    }

    /// All of them are ordinary memory from now on.
    pub(crate) fn silence_all(&self, descriptor: &Descriptor) {
        descriptor.let_go(self.memory.addr(), self.pages.to_bytes());
    }
}
