//! The limit of the background's rate.

use std::time::{Duration, Instant};

use page_units::ByteLen;

/// A token bucket: it may be overdrawn by one piece, and is then paid back by waiting.
#[derive(Debug)]
pub(super) struct Bucket {
    per_second: f64,
    bytes: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn new(per_second: ByteLen) -> Bucket {
        Bucket { per_second: to_f64(per_second.0.max(1)), bytes: 0.0, at: Instant::now() }
    }

    pub(super) fn take(&mut self, len: ByteLen) {
        self.refill();
        self.bytes -= to_f64(len.0);
    }

    fn refill(&mut self) {
        let now = Instant::now();
        let most = self.per_second / 100.0;
        self.bytes = (self.bytes + self.per_second * (now - self.at).as_secs_f64()).min(most);
        self.at = now;
    }

    pub(super) fn debt(&mut self) -> Option<Duration> {
        self.refill();
        (self.bytes < 0.0).then(|| Duration::from_secs_f64((-self.bytes / self.per_second).min(3600.0)))
    }
}

/// Exact up to 2^53, which is more than any rate.
#[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
fn to_f64(n: u64) -> f64 {
    n as f64
}
