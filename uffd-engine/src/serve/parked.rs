//! The only handler of an engine, which may wait for its messages inside the gate.

use nix::errno::Errno;

use crate::memory::Memory;
use crate::memory::gate::KNOCKS;
use crate::pause::PausePoint;
use crate::sys::abi::Message;

/// After so many reads nobody seems to install but the handler: it waits inside. Twice as many after each time it was
/// disturbed.
const PATIENCE: u32 = 8;

/// When a handler waits inside the gate.
#[derive(Debug)]
pub(crate) struct Parked {
    /// It is the only one, and may be disturbed so often.
    knocks: u64,
    /// How many reads went by undisturbed, and how many have to.
    quiet: u32,
    patience: u32,
    /// Whether the descriptor is blocking: it is only while this handler uses it so.
    blocking: bool,
}

impl Parked {
    /// `alone`: no other handler reads.
    pub(crate) fn new(alone: bool) -> Parked {
        Parked { knocks: if alone { KNOCKS } else { 0 }, quiet: 0, patience: PATIENCE, blocking: false }
    }

    /// Waits inside, reads and applies what comes. `None` if that is not for now: the descriptor does not block then.
    pub(crate) fn read(
        &mut self,
        core: &Memory,
        messages: &mut [Message],
        again: bool,
    ) -> Option<Result<usize, Errno>> {
        if again || !self.in_peace() {
            return self.outside(core);
        }
        let Some(inside) = core.gate.wait_inside(&core.descriptor, KNOCKS - self.knocks) else {
            self.disturbed();
            return self.outside(core);
        };
        if !self.blocking {
            if let Err(errno) = core.descriptor.set_blocking(true) {
                return Some(Err(errno));
            }
            self.blocking = true;
        }
        core.pauses.at(PausePoint::WaitsInside);
        let read = core.receive(messages);
        let (alone, wanted) = inside.ready();
        if wanted {
            self.disturbed();
        }
        Some(read.inspect(|&count| core.apply(alone.as_ref(), &messages[..count])))
    }

    /// Whether to go in for the next read.
    fn in_peace(&mut self) -> bool {
        let peace = self.knocks > 0 && self.quiet >= self.patience;
        self.quiet = self.quiet.saturating_add(1);
        peace
    }

    fn disturbed(&mut self) {
        self.quiet = 0;
        self.patience = self.patience.saturating_mul(2);
        self.knocks = self.knocks.saturating_sub(1);
    }

    /// From now on a read must not block.
    fn outside(&mut self, core: &Memory) -> Option<Result<usize, Errno>> {
        if self.blocking {
            self.blocking = false;
            return core.descriptor.set_blocking(false).err().map(Err);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_in_less_and_less_often_and_in_the_end_no_more() {
        let mut parked = Parked::new(true);
        let mut peace = 8;
        for _ in 0..KNOCKS {
            assert_eq!((0..).take_while(|_| !parked.in_peace()).count(), peace);
            assert!(parked.in_peace());
            parked.disturbed();
            peace *= 2;
        }
        assert!((0..1 << 20).all(|_| !parked.in_peace()));
        assert!((0..100).all(|_| !Parked::new(false).in_peace()));
    }
}
