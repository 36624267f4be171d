//! The threads that read page faults.

use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use page_units::HostAddr;

use crate::EngineError;
use crate::load::fault::Origin;
use crate::memory::Memory;
use crate::memory::gate::{Alone, InHaste};
use crate::serve::parked::Parked;
use crate::serve::placement::bind;
use crate::serve::wait::{Waiter, Woken};
use crate::sys::abi::{Message, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP};
use crate::sys::ops;

/// So many messages are read at a time at most.
const BATCH: usize = 64;

/// After so many reads that brought one message there is another that takes all: a read that has room looks for more
/// before it returns, and whoever has faulted waits for that. Not where events are read: a discard is read together with
/// the faults that came before it, so as to come first.
const READS_OF_ONE: usize = 8;

impl Memory {
    /// Reads messages, and applies the events among them, while no install is under way. Answers how many there are.
    pub(crate) fn read(&self, messages: &mut [Message]) -> Result<usize, Errno> {
        let reading = self.reading();
        let count = self.receive(messages)?;
        self.apply(reading.as_ref().and_then(InHaste::alone), &messages[..count]);
        Ok(count)
    }

    /// Reads messages. Answers how many there are.
    pub(crate) fn receive(&self, messages: &mut [Message]) -> Result<usize, Errno> {
        match ops::read(self.descriptor.fd(), messages) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
            other => other,
        }
    }

    /// Applies the events among messages that were read while the reader was alone.
    pub(crate) fn apply(&self, alone: Option<&Alone<'_>>, messages: &[Message]) {
        for message in messages {
            if matches!(message.event, UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP) {
                self.removed(alone, HostAddr(message.word0), HostAddr(message.word1));
            }
        }
    }

    /// Before the first handler starts, and after the last one has died, an event would be waited for in vain: reads
    /// what there is. Faults are left to the first handler; after the last one they are woken by whoever poisons them.
    ///
    /// The caller is not installing.
    pub(crate) fn read_for_want_of_handlers(&self) {
        let handlers = self.handlers.lock();
        if !self.gated() || *handlers > 0 {
            return;
        }
        let mut messages = [Message::default(); BATCH];
        while let Ok(count @ 1..) = self.read(&mut messages) {
            let faults = messages[..count].iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT);
            self.retry.faults(faults.filter_map(|fault| self.locate(HostAddr(fault.word1))));
        }
    }
}

/// Says that a handler has ended, however it did.
struct Leaving {
    core: Arc<Memory>,
    waiter: Arc<Waiter>,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.core.status.fail(EngineError::ThreadDied("a fault handler panicked"));
        }
        // Whoever reads for want of handlers must not wait.
        if self.core.gated()
            && let Err(errno) = self.core.descriptor.set_blocking(false)
        {
            log::error!("the descriptor of an engine can't be made non-blocking: {errno}");
        }
        self.waiter.left(&self.core);
    }
}

/// Runs a handler on this thread until it is stopped. `alone`: there is no other.
pub(crate) fn run(core: &Arc<Memory>, waiter: &Arc<Waiter>, origin: &Origin, cpu: Option<usize>, alone: bool) {
    let _leaving = Leaving { core: Arc::clone(core), waiter: Arc::clone(waiter) };
    core.reads_events();
    bind(cpu);
    let mut messages = [Message::default(); BATCH];
    let mut again = core.retry.some();
    let mut singles = 0;
    let mut parked = Parked::new(alone);
    loop {
        let room = if core.gated() || singles % READS_OF_ONE == 0 { BATCH } else { 1 };
        let count = match waiter.next(core, &mut parked, &mut messages[..room], again) {
            Ok(Woken::Messages(count)) => count,
            Ok(Woken::Stop) => return,
            Err(errno) => return core.status.fail(EngineError::Events(errno)),
        };
        let since = Instant::now();
        singles = if count > 1 { 0 } else { singles + 1 };
        let mut stop = false;
        for message in messages[..count].iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT) {
            let addr = HostAddr(message.word1);
            if waiter.answers(core, addr) {
                stop = true;
                continue;
            }
            if core.gate.is_knock(addr) {
                continue;
            }
            core.fault(origin, addr, message.word0, since);
        }
        if stop {
            return;
        }
        if again || core.retry.some() {
            again = core.serve_deferred(origin);
            if again {
                // Whoever discards has to run before the kernel lets us install anything.
                std::thread::yield_now();
            }
        }
    }
}
