//! A set of pages.

use page_units::{Layout, PageCount, PageIndex, PageRun};

/// One bit for each page of a layout.
#[derive(Clone, Debug)]
pub struct PageSet {
    blocks: Vec<Vec<u64>>,
}

impl PageSet {
    /// An empty set of the pages of `layout`.
    pub fn new(layout: &Layout) -> PageSet {
        let words = |pages: PageCount| usize::try_from(pages.0.div_ceil(64)).unwrap_or(usize::MAX);
        PageSet { blocks: layout.blocks().iter().map(|block| vec![0; words(block.pages())]).collect() }
    }

    /// Adds the pages of `run`, which must be in the layout, and tells how many were not there.
    pub fn insert(&mut self, run: PageRun) -> PageCount {
        let mut fresh = 0;
        let block = &mut self.blocks[run.block.0 as usize];
        for (word, mask) in words(run) {
            fresh += u64::from((mask & !block[word]).count_ones());
            block[word] |= mask;
        }
        PageCount(fresh)
    }

    /// How many pages of `run` are not there.
    pub fn lacking(&self, run: PageRun) -> PageCount {
        let block = &self.blocks[run.block.0 as usize];
        PageCount(words(run).map(|(word, mask)| u64::from((mask & !block[word]).count_ones())).sum())
    }

    /// The first pages of `run` that are not there, as a run; empty if all are.
    pub fn first_gap(&self, run: PageRun) -> PageRun {
        let from = self.find(run, false);
        let (_, rest) = run.split_at(from);
        let (gap, _) = rest.split_at(self.find(rest, true));
        gap
    }

    /// How many pages there are in `run` before the first whose bit is `set`.
    fn find(&self, run: PageRun, set: bool) -> PageCount {
        let block = &self.blocks[run.block.0 as usize];
        for (word, mask) in words(run) {
            let bits = mask & if set { block[word] } else { !block[word] };
            if bits != 0 {
                return PageIndex(word as u64 * 64 + u64::from(bits.trailing_zeros())) - run.first;
            }
        }
        run.pages
    }
}

/// The words that hold the bits of `run`, with a mask of the bits.
fn words(run: PageRun) -> impl Iterator<Item = (usize, u64)> {
    let (first, end) = (run.first.0, run.end().0);
    let range = if run.is_empty() { 0..0 } else { first / 64..end.div_ceil(64) };
    range.filter_map(move |word| {
        let low = first.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        let mask = (u64::MAX >> (64 - (high - low))) << low;
        Some((usize::try_from(word).ok()?, mask))
    })
}

#[cfg(test)]
mod tests {
    use page_units::{BlockId, ByteLen, PageSize, RamBlock};

    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
    }

    #[test]
    fn bits_are_those_of_the_run_and_no_others() {
        let block = RamBlock::new("a", ByteLen(200 * 4096), PageSize::SMALL).unwrap();
        let layout = Layout::new(vec![block]).unwrap();
        let mut model = [false; 200];
        let mut set = PageSet::new(&layout);
        for (first, pages) in [(0, 1), (63, 2), (10, 0), (64, 64), (5, 130), (199, 1), (190, 10)] {
            let range = usize::try_from(first).unwrap()..usize::try_from(first + pages).unwrap();
            let fresh = model[range.clone()].iter().filter(|there| !**there).count() as u64;
            assert_eq!(set.lacking(run(first, pages)), PageCount(fresh));
            assert_eq!(set.insert(run(first, pages)), PageCount(fresh));
            model[range].fill(true);
            for at in 0..200 {
                let from = usize::try_from(at).unwrap();
                let gap = set.first_gap(run(at, 200 - at));
                let start = model[from..].iter().position(|there| !there);
                assert_eq!(gap.is_empty(), start.is_none());
                if let Some(start) = start {
                    let length = model[from + start..].iter().take_while(|there| !**there).count();
                    assert_eq!(gap, run(at + start as u64, length as u64));
                }
            }
        }
    }
}
