//! What an engine did: counters and a histogram that cost a few nanoseconds each, always on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use page_units::ByteLen;

/// A snapshot of an engine's counters.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Page faults of the guest that were served, of any kind.
    pub demand_faults: u64,
    /// Of them, how many touched a page that is zero.
    pub demand_zero_faults: u64,
    /// Of them, minor faults: the file behind the memory held the page already.
    pub minor_faults: u64,
    /// 4 KiB pages of content installed because somebody waited for them.
    pub demand_pages: u64,
    /// 4 KiB pages of content installed in the background, or unasked.
    pub background_pages: u64,
    /// 4 KiB pages of zeros installed, always on demand.
    pub zero_pages_installed: u64,
    /// 4 KiB pages that the source said are zero, and that were left to the kernel.
    pub zero_pages_skipped: u64,
    /// Bytes of content installed.
    pub bytes: ByteLen,
    /// Pages that arrived although the guest had them already, or had given them back.
    pub duplicates: u64,
    /// Times the kernel asked to read an event first (`EAGAIN`).
    pub retries: u64,
    /// Pages that the guest gave back.
    pub removed_pages: u64,
    /// Pages that are poisoned.
    pub poisoned_pages: u64,
    /// From the start of the engine to the first page fault.
    pub time_to_first_fault: Option<Duration>,
    /// From the start of the engine until the last page was in.
    pub time_to_complete: Option<Duration>,
    /// From the fault to the wake, as the handler sees it: it begins when the handler has read the fault. In
    /// nanoseconds.
    pub latency: Latency,
}

/// The distribution of a latency, with an error of at most 6%.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Latency {
    /// How many were measured.
    pub count: u64,
    /// Median.
    pub p50: Duration,
    /// 99 of 100 were at most this.
    pub p99: Duration,
    /// The largest.
    pub max: Duration,
}

/// Latencies beyond an hour count as one: in nanoseconds.
const LONGEST: u64 = 3_600_000_000_000;
/// Buckets per power of two, as a power of two.
const FINE: u32 = 4;
const BUCKETS: usize = 64 << FINE;

/// A histogram that many threads add to without a lock.
#[derive(Debug)]
struct Buckets(Box<[AtomicU64]>);

impl Buckets {
    fn new() -> Buckets {
        Buckets((0..BUCKETS).map(|_| AtomicU64::new(0)).collect())
    }

    fn add(&self, nanos: u64) {
        self.0[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
    }

    fn latency(&self) -> Latency {
        let Ok(mut histogram) = Histogram::<u64>::new_with_max(LONGEST, 2) else { return Latency::default() };
        for (index, count) in self.0.iter().enumerate() {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                histogram.saturating_record_n(middle(index), count);
            }
        }
        let at = |quantile| Duration::from_nanos(histogram.value_at_quantile(quantile));
        Latency { count: histogram.len(), p50: at(0.5), p99: at(0.99), max: Duration::from_nanos(histogram.max()) }
    }
}

fn bucket(nanos: u64) -> usize {
    let value = nanos.max(1 << FINE);
    let power = value.ilog2();
    let fine = value >> (power - FINE) & ((1 << FINE) - 1);
    usize::try_from(u64::from(power - FINE) << FINE | fine).unwrap_or(BUCKETS - 1)
}

fn middle(index: usize) -> u64 {
    let (power, fine) = (index >> FINE, (index & ((1 << FINE) - 1)) as u64);
    let step = 1u64 << power.min(59);
    ((1 << FINE) + fine) * step + step / 2
}

/// The counters as the threads of an engine see them.
#[derive(Debug)]
pub(crate) struct Counters {
    started: Instant,
    pub(crate) demand_faults: AtomicU64,
    pub(crate) demand_zero_faults: AtomicU64,
    pub(crate) minor_faults: AtomicU64,
    pub(crate) demand_pages: AtomicU64,
    pub(crate) background_pages: AtomicU64,
    pub(crate) zero_installed: AtomicU64,
    pub(crate) zero_skipped: AtomicU64,
    pub(crate) duplicates: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) removed: AtomicU64,
    pub(crate) poisoned: AtomicU64,
    first_fault: AtomicU64,
    complete: AtomicU64,
    latency: Buckets,
}

pub(crate) fn bump(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn new() -> Counters {
        let zero = || AtomicU64::new(0);
        Counters {
            started: Instant::now(),
            demand_faults: zero(),
            demand_zero_faults: zero(),
            minor_faults: zero(),
            demand_pages: zero(),
            background_pages: zero(),
            zero_installed: zero(),
            zero_skipped: zero(),
            duplicates: zero(),
            retries: zero(),
            removed: zero(),
            poisoned: zero(),
            first_fault: zero(),
            complete: zero(),
            latency: Buckets::new(),
        }
    }

    /// A fault was read at `at`; answers whether it is the first.
    pub(crate) fn fault(&self, at: Instant) -> bool {
        bump(&self.demand_faults, 1);
        self.first_fault.load(Ordering::Relaxed) == 0 && set_once(&self.first_fault, at - self.started)
    }

    pub(crate) fn resolved(&self, since: Instant) {
        self.latency.add(u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn complete(&self) -> Duration {
        let took = self.started.elapsed();
        set_once(&self.complete, took);
        took
    }

    pub(crate) fn time_to_first_fault(&self) -> Option<Duration> {
        get(&self.first_fault)
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let pages = of(&self.demand_pages) + of(&self.background_pages);
        Stats {
            demand_faults: of(&self.demand_faults),
            demand_zero_faults: of(&self.demand_zero_faults),
            minor_faults: of(&self.minor_faults),
            demand_pages: of(&self.demand_pages),
            background_pages: of(&self.background_pages),
            zero_pages_installed: of(&self.zero_installed),
            zero_pages_skipped: of(&self.zero_skipped),
            bytes: page_units::PageCount(pages).to_bytes(),
            duplicates: of(&self.duplicates),
            retries: of(&self.retries),
            removed_pages: of(&self.removed),
            poisoned_pages: of(&self.poisoned),
            time_to_first_fault: get(&self.first_fault),
            time_to_complete: get(&self.complete),
            latency: self.latency.latency(),
        }
    }
}

/// Times are kept as nanoseconds plus one, so that 0 is "not yet".
fn set_once(time: &AtomicU64, value: Duration) -> bool {
    let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX - 1) + 1;
    time.compare_exchange(0, nanos, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

fn get(time: &AtomicU64) -> Option<Duration> {
    time.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_close_to_their_values() {
        for nanos in [16u64, 17, 1000, 4400, 4401, 123_456_789, u64::MAX / 32] {
            let near = middle(bucket(nanos));
            assert!(near.abs_diff(nanos) <= nanos / 16 + 1, "{nanos} became {near}");
        }
        assert!(bucket(u64::MAX) < BUCKETS && bucket(0) == 0);
    }

    #[test]
    fn quantiles_are_found() {
        let counters = Counters::new();
        for nanos in 1..=100 {
            counters.latency.add(nanos * 1000);
        }
        let latency = counters.snapshot().latency;
        assert_eq!(latency.count, 100);
        assert!(latency.p50.abs_diff(Duration::from_micros(50)) < Duration::from_micros(4), "{latency:?}");
        assert!(latency.p99.abs_diff(Duration::from_micros(99)) < Duration::from_micros(7), "{latency:?}");
    }
}
