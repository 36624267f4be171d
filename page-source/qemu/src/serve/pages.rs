//! Which pages went where: a few bits for each granule.

use std::sync::atomic::{AtomicU64, Ordering};

use page_units::{BlockId, Layout, PageIndex, PageRun};

use super::bits::Bits;

/// The granules of one RAM block.
#[derive(Debug)]
pub(super) struct BlockPages {
    pub(super) name: String,
    /// Pages in a granule.
    pub(super) per_granule: u64,
    pub(super) granules: u64,
    /// It went, or is going, to the destination. Exactly one thread sets it, and that one sends.
    pub(super) sent: Bits,
    /// It is known to be zero, and nobody has asked for it.
    pub(super) zero: Bits,
    /// The destination has asked for it.
    pub(super) wanted: Bits,
    /// The source was asked for it in the background, and has not answered.
    pub(super) asked: Bits,
}

impl BlockPages {
    /// The first granule from `from` on, and before `to`, that is neither sent nor zero nor asked for.
    pub(super) fn next_open(&self, from: u64, to: u64) -> Option<u64> {
        self.first(from, to, |closed| !closed)
    }

    /// The first granule from `from` on, and before `to`, that is one of these.
    pub(super) fn next_closed(&self, from: u64, to: u64) -> Option<u64> {
        self.first(from, to, |closed| closed)
    }

    fn first(&self, from: u64, to: u64, which: impl Fn(u64) -> u64) -> Option<u64> {
        let mut at = from;
        while at < to {
            let closed = self.sent.among(at) | self.zero.among(at) | self.asked.among(at);
            let ahead = which(closed) >> (at % 64);
            if ahead != 0 {
                let found = at + u64::from(ahead.trailing_zeros());
                return (found < to).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    fn has_unanswered(&self) -> bool {
        self.wanted.has_some_outside(&self.sent)
    }
}

/// All RAM blocks, in the order of the layout.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) blocks: Vec<BlockPages>,
    /// Pages of all granules whose bit is set in `asked`.
    pub(super) asked: AtomicU64,
}

impl Pages {
    /// `layout` has the destination's page sizes. Each block is a whole number of its pages.
    pub(super) fn new(layout: &Layout) -> Pages {
        let block = |block: &page_units::RamBlock| {
            let per_granule = block.page_size().pages().0;
            let granules = block.pages().0.div_ceil(per_granule);
            let bits = || Bits::new(granules);
            BlockPages {
                name: block.name().to_owned(),
                per_granule,
                granules,
                sent: bits(),
                zero: bits(),
                wanted: bits(),
                asked: bits(),
            }
        };
        Pages { blocks: layout.blocks().iter().map(block).collect(), asked: AtomicU64::new(0) }
    }

    pub(super) fn block(&self, id: BlockId) -> Option<&BlockPages> {
        self.blocks.get(usize::try_from(id.0).ok()?)
    }

    pub(super) fn find(&self, name: &str) -> Option<(BlockId, &BlockPages)> {
        (0..).map(BlockId).zip(&self.blocks).find(|(_, block)| block.name == name)
    }

    /// Notes that the source is asked for the granules of a run.
    pub(super) fn ask(&self, run: PageRun) {
        let Some(block) = self.block(run.block) else { return };
        let (first, end) = granules_of(block, run);
        let new: u32 = masks(first, end).map(|(at, mask)| block.asked.set_some(at, mask).count_ones()).sum();
        self.asked.fetch_add(u64::from(new) * block.per_granule, Ordering::SeqCst);
    }

    /// Notes that the source has answered for a granule.
    pub(super) fn answered(&self, block: &BlockPages, granule: u64) {
        self.answered_some(block, granule, 1 << (granule % 64));
    }

    /// Notes that the source has answered for the granules of the mask, of the 64 among which is `at`.
    pub(super) fn answered_some(&self, block: &BlockPages, at: u64, mask: u64) {
        let answered = block.asked.clear_some(at, mask).count_ones();
        if answered > 0 {
            self.asked.fetch_sub(u64::from(answered) * block.per_granule, Ordering::SeqCst);
        }
    }

    /// Whether the destination waits for a page that was not sent.
    pub(super) fn has_unanswered(&self) -> bool {
        self.blocks.iter().any(BlockPages::has_unanswered)
    }
}

/// From `first` to `end`, in parts of at most 64 that lie together in [`Bits`]: where each begins, and its bits.
pub(super) fn masks(first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let words = if first < end { first / 64..end.div_ceil(64) } else { 0..0 };
    words.map(move |word| {
        let (from, to) = ((word * 64).max(first), (word * 64 + 64).min(end));
        (from, (u64::MAX >> (64 - (to - from))) << (from % 64))
    })
}

/// The granules that a run touches.
pub(super) fn granules_of(block: &BlockPages, run: PageRun) -> (u64, u64) {
    (run.first.0 / block.per_granule, run.end().0.div_ceil(block.per_granule))
}

/// The pages of granules `first` to `end`.
pub(super) fn run_of(id: BlockId, block: &BlockPages, first: u64, end: u64) -> PageRun {
    let pages = page_units::PageCount((end - first) * block.per_granule);
    PageRun::new(id, PageIndex(first * block.per_granule), pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_what_is_between() {
        for (first, end) in [(0, 0), (5, 5), (64, 64), (0, 64), (3, 4), (63, 65), (60, 200), (64, 128), (127, 128)] {
            let bits = Bits::new(256);
            for (at, mask) in masks(first, end) {
                assert!((first..end).contains(&at), "{first} {end}");
                assert_eq!(bits.set_some(at, mask), mask);
                assert_eq!(bits.set_some(at, mask), 0);
            }
            assert!((0..256).all(|at| bits.get(at) == (first..end).contains(&at)), "{first} {end}");
            for (at, mask) in masks(first, end) {
                assert_eq!(bits.clear_some(at, u64::MAX), mask);
            }
        }
    }
}
