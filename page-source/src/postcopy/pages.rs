//! Which pages went where: a few bits for each granule.

use std::sync::atomic::{AtomicU64, Ordering};

use page_units::{BlockId, Layout, PageIndex, PageRun};

/// A bitmap that many threads change.
#[derive(Debug)]
pub(super) struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(bits: u64) -> Bits {
        Bits((0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, at: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(at / 64).ok()?)
    }

    pub(super) fn get(&self, at: u64) -> bool {
        self.word(at).is_some_and(|word| word.load(Ordering::SeqCst) >> (at % 64) & 1 == 1)
    }

    /// Sets a bit; whether it was clear.
    pub(super) fn set(&self, at: u64) -> bool {
        let mask = 1 << (at % 64);
        self.word(at).is_some_and(|word| word.fetch_or(mask, Ordering::SeqCst) & mask == 0)
    }

    /// Clears a bit; whether it was set.
    pub(super) fn clear(&self, at: u64) -> bool {
        let mask = 1 << (at % 64);
        self.word(at).is_some_and(|word| word.fetch_and(!mask, Ordering::SeqCst) & mask != 0)
    }
}

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
        let mut at = from;
        while at < to {
            let word = |bits: &Bits| bits.word(at).map_or(u64::MAX, |word| word.load(Ordering::SeqCst));
            let closed = word(&self.sent) | word(&self.zero) | word(&self.asked);
            let ahead = !closed >> (at % 64);
            if ahead != 0 {
                let found = at + u64::from(ahead.trailing_zeros());
                return (found < to).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    pub(super) fn is_open(&self, at: u64) -> bool {
        at < self.granules && !self.sent.get(at) && !self.zero.get(at) && !self.asked.get(at)
    }

    fn has_unanswered(&self) -> bool {
        let load = |word: &AtomicU64| word.load(Ordering::SeqCst);
        self.wanted.0.iter().zip(&self.sent.0).any(|(wanted, sent)| load(wanted) & !load(sent) != 0)
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
        let new = (first..end).filter(|at| block.asked.set(*at)).count();
        self.asked.fetch_add(new as u64 * block.per_granule, Ordering::SeqCst);
    }

    /// Notes that the source has answered for a granule.
    pub(super) fn answered(&self, block: &BlockPages, granule: u64) {
        if block.asked.clear(granule) {
            self.asked.fetch_sub(block.per_granule, Ordering::SeqCst);
        }
    }

    /// Whether the destination waits for a page that was not sent.
    pub(super) fn has_unanswered(&self) -> bool {
        self.blocks.iter().any(BlockPages::has_unanswered)
    }
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
