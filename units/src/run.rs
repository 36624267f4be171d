//! A run of pages: what every call of the page flow is about.

use std::fmt;

use crate::{BlockId, ByteLen, PageCount, PageIndex};

/// `pages` consecutive pages of one RAM block, beginning with `first`. May be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// The block the pages belong to.
    pub block: BlockId,
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: PageCount,
}

impl PageRun {
    /// The run of `pages` pages from `first` on.
    #[must_use]
    pub const fn new(block: BlockId, first: PageIndex, pages: PageCount) -> PageRun {
        PageRun { block, first, pages }
    }

    /// One page.
    #[must_use]
    pub const fn single(block: BlockId, page: PageIndex) -> PageRun {
        PageRun::new(block, page, PageCount(1))
    }

    /// The page after the last one; the last of all numbers, if that is beyond it.
    #[must_use]
    pub fn end(self) -> PageIndex {
        PageIndex(self.first.0.saturating_add(self.pages.0))
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> ByteLen {
        self.pages.to_bytes()
    }

    /// Whether there is no page in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.pages.0 == 0
    }

    /// Whether `page` of the same block is one of its pages.
    #[must_use]
    pub fn contains(self, page: PageIndex) -> bool {
        self.first <= page && page < self.end()
    }

    /// The first `at` pages (or all, if there are fewer) and the others.
    #[must_use]
    pub fn split_at(self, at: PageCount) -> (PageRun, PageRun) {
        let head = at.min(self.pages);
        (PageRun::new(self.block, self.first, head), PageRun::new(self.block, self.first + head, self.pages - head))
    }

    /// The pages that are also in `other`; empty if there are none, or the blocks differ.
    #[must_use]
    pub fn intersect(self, other: PageRun) -> PageRun {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        if self.block != other.block || first >= end {
            return PageRun::new(self.block, self.first, PageCount(0));
        }
        PageRun::new(self.block, first, end - first)
    }

    /// The run in pieces of at most `size` pages.
    ///
    /// # Panics
    /// If `size` is 0.
    pub fn pieces(self, size: PageCount) -> impl Iterator<Item = PageRun> {
        assert!(size.0 > 0, "pieces of no pages");
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (head, tail) = rest.split_at(size);
            rest = tail;
            Some(head)
        })
    }

    /// Each page of the run.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = PageIndex> {
        (self.first.0..self.end().0).map(PageIndex)
    }
}

impl fmt::Display for PageRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} pages {}..{}", self.block.0, self.first, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
    }

    #[test]
    fn splits_tile_the_run() {
        assert_eq!(run(5, 10).split_at(PageCount(3)), (run(5, 3), run(8, 7)));
        assert_eq!(run(5, 2).split_at(PageCount(3)), (run(5, 2), run(7, 0)));
        let pieces: Vec<_> = run(1, 10).pieces(PageCount(4)).collect();
        assert_eq!(pieces, [run(1, 4), run(5, 4), run(9, 2)]);
    }

    #[test]
    fn runs_of_one_block_intersect() {
        assert_eq!(run(0, 10).intersect(run(5, 10)), run(5, 5));
        assert!(run(0, 5).intersect(run(5, 1)).is_empty());
        let other = PageRun::new(BlockId(1), PageIndex(0), PageCount(9));
        assert!(run(0, 5).intersect(other).is_empty());
    }

    #[test]
    fn runs_beyond_all_numbers_are_only_outside() {
        const MAX: u64 = u64::MAX;
        for wild in [run(MAX, 1), run(MAX, MAX), run(10, MAX - 5)] {
            assert_eq!((wild.end(), wild.contains(PageIndex(5))), (PageIndex(MAX), false));
            assert!(wild.intersect(run(0, 10)).is_empty(), "{wild}");
        }
        assert_eq!(run(10, MAX - 5).intersect(run(0, 20)), run(10, 10));
    }
}
