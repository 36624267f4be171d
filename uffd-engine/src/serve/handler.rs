//! The threads that read page faults.

use std::sync::Arc;
use std::time::Instant;

use page_units::HostAddr;

use super::events::{self, BATCH};
use super::placement::bind;
use super::served::{Fault, Served};
use super::stop::Touch;
use super::wait::{Patience, Waiter, Woken};
use crate::sys::abi::{Message, UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP};
use crate::{EngineError, Errno};

/// After how many reads that brought one message there is another that takes all: a read with space for more looks for more
/// before it returns, and the faulting thread waits for that. Not where events are read: a discard is read together with
/// the faults that came before it, so as to come first.
const READS_OF_ONE: usize = 8;

/// Says that a handler has ended, however it did.
struct OnExit<'a> {
    served: &'a dyn Served,
    waiter: Arc<Waiter>,
}

impl Drop for OnExit<'_> {
    fn drop(&mut self) {
        let memory = self.served.memory();
        if std::thread::panicking() {
            self.served.fail(EngineError::ThreadDied("a fault handler panicked"));
        }
        // A read without handlers must not wait.
        if memory.view.gated()
            && let Err(errno) = memory.view.descriptor.set_blocking(false)
        {
            log::error!("the descriptor of an engine can't be made non-blocking: {errno}");
        }
        self.waiter.left(memory);
        // An engine that fails closed before the last handler has left reads nothing, and a discard would wait for ever.
        events::read_without_handlers(memory, self.served);
    }
}

/// Runs a handler on this thread until it is stopped. `alone`: there is no other.
pub(crate) fn run(served: &dyn Served, waiter: &Arc<Waiter>, cpu: Option<usize>, alone: bool) {
    let _exit = OnExit { served, waiter: Arc::clone(waiter) };
    let memory = &**served.memory();
    memory.view.reads_events();
    bind(cpu);
    let mut messages = [Message::default(); BATCH];
    let mut again = memory.view.retry.some();
    let mut singles = 0;
    let mut patience = Patience::new(alone);
    loop {
        let room = if memory.view.gated() || singles % READS_OF_ONE == 0 { BATCH } else { 1 };
        let count = match waiter.next(served, &mut patience, &mut messages[..room], again) {
            Ok(Woken::Messages(count)) => count,
            Ok(Woken::Stop) => return,
            Err(errno) => return served.fail(EngineError::Events(Errno::of(errno))),
        };
        let since = Instant::now();
        singles = if count > 1 { 0 } else { singles + 1 };
        let mut stop = false;
        for message in messages[..count].iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT) {
            let (addr, flags) = (HostAddr(message.word1), message.word0);
            let touch = waiter.touch(memory, addr);
            stop |= touch == Touch::Stop;
            let ours = touch != Touch::None || memory.view.gate.is_interruption(&memory.view.descriptor, addr);
            if ours {
                // It was answered.
            } else if flags & UFFD_PAGEFAULT_FLAG_WP == 0 {
                served.fault(Fault { addr, minor: flags & UFFD_PAGEFAULT_FLAG_MINOR != 0, since });
            } else if !memory.write_fault(addr) {
                served.fail(EngineError::StrayFault(addr));
            }
        }
        if stop {
            return;
        }
        if again || memory.view.retry.some() {
            again = serve_again(served);
        }
    }
}

/// Serves again what could not be served before an event was read. Answers whether some of it is left.
fn serve_again(served: &dyn Served) -> bool {
    let memory = served.memory();
    let (faults, writes) = memory.view.retry.take();
    for place in faults {
        served.fault_again(place);
    }
    for place in writes {
        memory.serve_write(place);
    }
    let left = memory.view.retry.some();
    if left {
        // The discarding thread has to run before the kernel lets us install anything.
        std::thread::yield_now();
    }
    left
}
