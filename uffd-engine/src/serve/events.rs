//! Reading messages, and applying what the guest gave back.

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr};

use super::served::Discarded;
use crate::memory::gate::{Alone, Priority};
use crate::memory::states::State;
use crate::memory::{Memory, Place};
use crate::pause::PausePoint;
use crate::sys::abi::{Message, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP};
use crate::sys::ops;

/// How many messages are read at a time at most.
pub(crate) const BATCH: usize = 64;

/// Reads messages, and applies the events among them, while no install is under way. Answers how many there are.
pub(crate) fn read(memory: &Memory, told: &dyn Discarded, messages: &mut [Message]) -> Result<usize, Errno> {
    let reading = memory.view.reading();
    let count = receive(memory, messages)?;
    apply(memory, told, reading.as_ref().and_then(Priority::alone), &messages[..count]);
    Ok(count)
}

/// Reads messages. Answers how many there are.
pub(crate) fn receive(memory: &Memory, messages: &mut [Message]) -> Result<usize, Errno> {
    match ops::read(memory.view.descriptor.fd(), messages) {
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(0),
        other => other,
    }
}

/// Applies the events among messages that were read while the reader was alone.
pub(crate) fn apply(memory: &Memory, told: &dyn Discarded, alone: Option<&Alone<'_>>, messages: &[Message]) {
    for message in messages {
        if matches!(message.event, UFFD_EVENT_REMOVE | UFFD_EVENT_UNMAP) {
            given_back(memory, told, alone, HostAddr(message.word0), HostAddr(message.word1));
        }
    }
}

/// The guest gave a range back: what was there is gone, and reads as zeros.
fn given_back(memory: &Memory, told: &dyn Discarded, alone: Option<&Alone<'_>>, start: HostAddr, end: HostAddr) {
    memory.pauses.at(PausePoint::DiscardRead);
    if let Some(holder) = alone.and_then(|gate| gate.as_ref()) {
        holder.given_back(start, end);
    }
    for (number, area) in memory.view.areas.iter().enumerate() {
        let range = area.region.range();
        let (from, to) = (start.max(range.start), end.min(range.end));
        if from >= to {
            continue;
        }
        let granule = area.granule.to_bytes().0;
        let first = ByteLen((from - range.start).0 / granule).get();
        let last = ByteLen((to - range.start).0.div_ceil(granule)).get();
        let mut waited_for = false;
        for at in first..last {
            waited_for |= remove(memory, told, Place { area: number, granule: at }) == State::Missing;
        }
        // What these waited for never comes: they fault again, and get zeros.
        if waited_for {
            memory.wake(Place { area: number, granule: first }, last - first);
        }
    }
}

/// A granule was given back, unless it is being installed. Answers what it was; somebody may wait for content that was
/// Missing, and has to be woken by the caller.
pub(crate) fn remove(memory: &Memory, told: &dyn Discarded, at: Place) -> State {
    let was = memory.remove(at);
    if was.state != State::InFlight {
        told.discarded(at, was.requested);
    }
    was.state
}

/// Reads what there is before the first handler starts, and after the last one has died: otherwise the thread that
/// caused an event would wait for ever. Faults are left to the first handler; after the last one they are woken by being
/// poisoned.
///
/// The caller is not installing.
pub(crate) fn read_without_handlers(memory: &Memory, told: &dyn Discarded) {
    let handlers = memory.view.handlers.lock();
    if !memory.view.gated() || *handlers > 0 {
        return;
    }
    let mut messages = [Message::default(); BATCH];
    while let Ok(count @ 1..) = read(memory, told, &mut messages) {
        let faults = messages[..count].iter().filter(|message| message.event == UFFD_EVENT_PAGEFAULT);
        memory.view.retry.faults(faults.filter_map(|fault| memory.view.locate(HostAddr(fault.word1))));
    }
}
