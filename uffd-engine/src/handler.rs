//! The threads that read page faults.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;
use page_source::HostAddr;

use crate::core::Core;
use crate::doorbell::Doorbell;
use crate::fault::Origin;
use crate::gate::{Alone, InHaste};
use crate::solo::Solo;
use crate::sys::abi::{Message, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP};
use crate::sys::ops;
use crate::{EngineError, StartError};

/// So many messages are read at a time at most.
const BATCH: usize = 64;

/// After so many reads that brought one message there is another that takes all: a read that has room looks for more
/// before it returns, and whoever has faulted waits for that. Not where events are read: a discard is read together with
/// the faults that came before it, so as to come first.
const READS_OF_ONE: usize = 8;

/// How handlers wait, and how they are stopped.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// In `read`; where events are read, in `poll` outside the gate or, see [`Solo`], in `read` inside it. A doorbell stops
    /// them.
    Bell(Doorbell),
    /// In `poll`; an event descriptor, which stays readable, stops them all. For memory of another process, in which
    /// there is no place for a doorbell.
    Event(EventFd),
    /// Not at all.
    Spin(AtomicBool),
}

/// What a handler was woken for.
enum Woken {
    Messages(usize),
    Stop,
}

impl Waiter {
    pub(crate) fn event() -> nix::Result<Waiter> {
        Ok(Waiter::Event(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// A handler is about to start.
    pub(crate) fn joining(&self, core: &Core) {
        *core.handlers.lock() += 1;
        if let Waiter::Bell(bell) = self {
            bell.joining();
        }
    }

    /// A handler has ended, or did not start.
    pub(crate) fn left(&self, core: &Core) {
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
    fn answers(&self, core: &Core, addr: HostAddr) -> bool {
        matches!(self, Waiter::Bell(bell) if bell.answer(&core.descriptor, addr))
    }

    /// Waits for messages (not at all if `again`, since there is something to try again) and reads them. Events are
    /// read and applied while no install is under way.
    fn next(&self, core: &Core, solo: &mut Solo, messages: &mut [Message], again: bool) -> Result<Woken, Errno> {
        match self {
            Waiter::Bell(_) if !core.gated() => {}
            Waiter::Bell(_) => match solo.read(core, messages, again) {
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

impl Core {
    /// Reads messages, and applies the events among them, while no install is under way. Answers how many there are.
    fn read(&self, messages: &mut [Message]) -> Result<usize, Errno> {
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
            self.deferred.faults(faults.filter_map(|fault| self.locate(HostAddr(fault.word1))));
        }
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
fn wait(core: &Core, stop: Option<BorrowedFd<'_>>, again: bool) -> Result<Ready, Errno> {
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

/// Says that a handler has ended, however it did.
struct Leaving {
    core: Arc<Core>,
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
pub(crate) fn run(core: &Arc<Core>, waiter: &Arc<Waiter>, origin: &Origin, cpu: Option<usize>, alone: bool) {
    let _leaving = Leaving { core: Arc::clone(core), waiter: Arc::clone(waiter) };
    core.reads_events();
    bind(cpu);
    let mut messages = [Message::default(); BATCH];
    let mut again = core.deferred.some();
    let mut singles = 0;
    let mut solo = Solo::new(alone);
    loop {
        let room = if core.gated() || singles % READS_OF_ONE == 0 { BATCH } else { 1 };
        let count = match waiter.next(core, &mut solo, &mut messages[..room], again) {
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
        if again || core.deferred.some() {
            again = core.serve_deferred(origin);
            if again {
                // Whoever discards has to run before the kernel lets us install anything.
                std::thread::yield_now();
            }
        }
    }
}

/// Binds this thread to a core, if that exists.
pub(crate) fn bind(cpu: Option<usize>) {
    let Some(cpu) = cpu else { return };
    let mut set = CpuSet::new();
    if let Err(errno) = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
        log::warn!("binding a thread of the engine to core {cpu} failed: {errno}");
    }
}

/// Whether threads can be bound to all of these cores. What a thread may use is seldom more than what it uses now, and the
/// kernel tells: it leaves out what it does not grant.
pub(crate) fn check_cores<'a>(cores: impl Iterator<Item = &'a usize>) -> Result<(), StartError> {
    let Some(before) = affinity() else { return Ok(()) };
    let mut wanted = before;
    let mut beyond = Vec::new();
    for &core in cores {
        if !before.is_set(core).unwrap_or(false) {
            wanted.set(core).map_err(|_| StartError::Core(core))?;
            beyond.push(core);
        }
    }
    if beyond.is_empty() || sched_setaffinity(Pid::from_raw(0), &wanted).is_err() {
        return Ok(());
    }
    let granted = affinity();
    set_affinity(Some(before));
    let refused = |core: &usize| granted.is_some_and(|granted| !granted.is_set(*core).unwrap_or(false));
    beyond.into_iter().find(refused).map_or(Ok(()), |core| Err(StartError::Core(core)))
}

/// The cores that this thread may run on.
pub(crate) fn affinity() -> Option<CpuSet> {
    sched_getaffinity(Pid::from_raw(0)).ok()
}

/// Puts back what [`affinity`] said.
pub(crate) fn set_affinity(set: Option<CpuSet>) {
    if let Some(Err(errno)) = set.map(|set| sched_setaffinity(Pid::from_raw(0), &set)) {
        log::warn!("putting back the cores of a thread failed: {errno}");
    }
}
