//! In which order the background goes: on from the last request, round and round, until a whole round finds nothing.

use std::sync::atomic::Ordering;

use page_source::{Content, Pages as Source};
use page_units::{BlockId, PageCount, PageIndex, PageRun};

use super::pages::{BlockPages, Pages, run_of};

/// How far the source is asked at a time what it knows, in pages: 1 GiB.
const LOOK_AHEAD: u64 = 1 << 18;

/// What is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// These pages.
    Run(PageRun),
    /// Nothing before the source has answered.
    Waiting,
    /// Nothing at all.
    Done,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Order {
    block: u32,
    granule: u64,
}

impl Order {
    /// Goes on at this granule.
    pub(super) fn follow(&mut self, block: BlockId, granule: u64) {
        (self.block, self.granule) = (block.0, granule);
    }

    /// At most `most` pages, but at least a granule.
    pub(super) fn next(&mut self, pages: &Pages, source: &dyn Source, most: u64) -> Next {
        let count = u32::try_from(pages.blocks.len()).unwrap_or(u32::MAX);
        if count == 0 {
            return Next::Done;
        }
        // From here to the end of the block, all of the others, and what is before here.
        for lap in 0..=count {
            let id = BlockId((self.block + lap) % count);
            let Some(block) = pages.block(id) else { continue };
            let (from, to) = match lap {
                0 => (self.granule, block.granules),
                last if last == count => (0, self.granule.min(block.granules)),
                _ => (0, block.granules),
            };
            if let Some((first, end)) = open_run(source, id, block, from, to, most) {
                self.follow(id, end);
                return Next::Run(run_of(id, block, first, end));
            }
        }
        if pages.asked.load(Ordering::SeqCst) > 0 { Next::Waiting } else { Next::Done }
    }
}

/// The first granules between `from` and `to` that are open and not zero, as the source says.
fn open_run(source: &dyn Source, id: BlockId, block: &BlockPages, from: u64, to: u64, most: u64) -> Option<(u64, u64)> {
    let mut at = from;
    while let Some(first) = block.next_open(at, to) {
        let (zero, stored) = spans(source, id, block, first, most);
        if zero > 0 {
            at = first + zero;
            continue;
        }
        let longest = stored.min(most.div_ceil(block.per_granule)).min(to - first).max(1);
        let end = block.next_closed(first + 1, first + longest).unwrap_or(first + longest);
        return Some((first, end));
    }
    None
}

/// How many granules from `first` on are all zero, or else how many, up to about `most` pages, are not.
fn spans(source: &dyn Source, id: BlockId, block: &BlockPages, first: u64, most: u64) -> (u64, u64) {
    let start = first * block.per_granule;
    let ahead = PageCount((block.granules * block.per_granule).saturating_sub(start).min(LOOK_AHEAD));
    let mut span = source.content(PageRun::new(id, PageIndex(start), ahead));
    if span.content == Content::Zero && span.pages.0 >= block.per_granule {
        return (span.pages.0 / block.per_granule, 0);
    }
    // Within a huge page, whatever it holds goes together.
    let mut length = 0;
    while span.pages.0 > 0 && length < most && (span.content != Content::Zero || block.per_granule > 1) {
        length += span.pages.0;
        if block.per_granule > 1 {
            break;
        }
        span = source.content(PageRun::new(id, PageIndex(start + length), PageCount(most)));
    }
    (0, (length / block.per_granule).max(1))
}
