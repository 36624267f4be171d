//! How much lies between us and the destination, where the kernel does not tell: after each piece goes a PING, and its
//! PONG says that everything before it was taken.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// PINGs of this kind have this bit, the others do not.
const OURS: u32 = 1 << 31;
/// More are never under way.
const MOST: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Credit {
    sent: Mutex<(u32, VecDeque<(u32, u64)>)>,
    confirmed: AtomicU64,
    came: Condvar,
}

impl Credit {
    /// The number of the next PING, which follows byte `position`.
    pub(super) fn ping(&self, position: u64) -> u32 {
        let mut sent = self.sent.lock();
        sent.0 = sent.0.wrapping_add(1);
        let number = OURS | sent.0;
        if sent.1.len() == MOST {
            sent.1.pop_front();
        }
        sent.1.push_back((number, position));
        number
    }

    /// Whether this PONG was for one of them.
    pub(super) fn pong(&self, number: u32) -> bool {
        let mut sent = self.sent.lock();
        let Some(at) = sent.1.iter().position(|(ping, _)| *ping == number) else { return false };
        if let Some((_, position)) = sent.1.drain(..=at).next_back() {
            self.confirmed.fetch_max(position, Ordering::SeqCst);
            self.came.notify_all();
        }
        true
    }

    /// Notes that the first `position` bytes do not count: nothing of the background is among them.
    pub(super) fn confirm(&self, position: u64) {
        let _locked = self.sent.lock();
        self.confirmed.fetch_max(position, Ordering::SeqCst);
        self.came.notify_all();
    }

    /// Waits for a PONG, at most so long.
    pub(super) fn wait(&self, longest: Duration) {
        self.came.wait_for(&mut self.sent.lock(), longest);
    }

    /// How many of the first `position` bytes are not confirmed.
    pub(super) fn under_way(&self, position: u64) -> u64 {
        position.saturating_sub(self.confirmed.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_confirms_all_before_it_and_a_strange_one_nothing() {
        let credit = Credit::default();
        let first = credit.ping(100);
        let second = credit.ping(250);
        assert_eq!(credit.under_way(300), 300);
        assert!(!credit.pong(1) && !credit.pong(second + 1));
        assert!(credit.pong(second));
        assert_eq!(credit.under_way(300), 50);
        assert!(!credit.pong(first));
        assert_eq!(credit.under_way(300), 50);
        credit.confirm(200);
        assert_eq!(credit.under_way(300), 50);
        credit.confirm(290);
        assert_eq!(credit.under_way(300), 10);
    }
}
