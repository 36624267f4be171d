//! The RAM blocks of a guest.

use std::error::Error;
use std::fmt;

use crate::{ByteLen, PAGE_SIZE, PageCount, PageIndex, PageRun};

/// The number of a RAM block in its [`Layout`]; the first is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

/// A page size in bytes: a power of two, at least [`PAGE_SIZE`]. The size of a granule, which one install covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u64);

impl PageSize {
    /// 4 KiB.
    pub const SMALL: PageSize = PageSize(PAGE_SIZE);
    /// 2 MiB.
    pub const HUGE: PageSize = PageSize(2 << 20);

    /// A page size of `bytes` bytes, if that is a power of two and at least 4096.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<PageSize> {
        if bytes.is_power_of_two() && bytes >= PAGE_SIZE { Some(PageSize(bytes)) } else { None }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> ByteLen {
        ByteLen(self.0)
    }

    /// In pages of 4 KiB.
    #[must_use]
    pub const fn pages(self) -> PageCount {
        PageCount(self.0 / PAGE_SIZE)
    }
}

/// A named piece of guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    name: String,
    length: ByteLen,
    page_size: PageSize,
}

impl RamBlock {
    /// A block of `length` bytes whose memory is backed by pages of `page_size`.
    ///
    /// # Errors
    /// If the length is not a whole number of 4 KiB pages.
    pub fn new(name: impl Into<String>, length: ByteLen, page_size: PageSize) -> Result<RamBlock, LayoutError> {
        let name = name.into();
        if !length.0.is_multiple_of(PAGE_SIZE) {
            return Err(LayoutError::PartialPage { block: name, length });
        }
        Ok(RamBlock { name, length, page_size })
    }

    /// Its name, e.g. `pc.ram`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length, a multiple of 4096 bytes.
    #[must_use]
    pub const fn length(&self) -> ByteLen {
        self.length
    }

    /// Its length in pages of 4 KiB.
    #[must_use]
    pub const fn pages(&self) -> PageCount {
        self.length.to_pages()
    }

    /// The page size of its backing.
    #[must_use]
    pub const fn page_size(&self) -> PageSize {
        self.page_size
    }
}

/// The RAM blocks of a guest, in a fixed order: what [`BlockId`] counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    blocks: Vec<RamBlock>,
    /// Where they are in `blocks`, by name.
    sorted: Vec<usize>,
}

impl Layout {
    /// A layout of these blocks.
    ///
    /// # Errors
    /// If two blocks have one name, there are more than `u32::MAX`, or their lengths add up to more than `u64::MAX`.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Layout, LayoutError> {
        let mut sorted: Vec<usize> = (0..blocks.len()).collect();
        sorted.sort_unstable_by_key(|at| blocks[*at].name());
        if let Some(twice) = sorted.windows(2).find(|pair| blocks[pair[0]].name() == blocks[pair[1]].name()) {
            return Err(LayoutError::DuplicateName { block: blocks[twice[0]].name().to_owned() });
        }
        let total = blocks.iter().try_fold(ByteLen(0), |sum, block| sum.checked_add(block.length()));
        if total.is_none() || u32::try_from(blocks.len()).is_err() {
            return Err(LayoutError::TooLarge);
        }
        Ok(Layout { blocks, sorted })
    }

    /// One block of 4 KiB pages.
    ///
    /// # Errors
    /// If the name is empty or too long, or the length is not a whole number of pages.
    pub fn single(name: impl Into<String>, length: ByteLen) -> Result<Layout, LayoutError> {
        Layout::new(vec![RamBlock::new(name, length, PageSize::SMALL)?])
    }

    /// The blocks with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (BlockId, &RamBlock)> {
        (0..).map(BlockId).zip(&self.blocks)
    }

    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The block of that number.
    #[must_use]
    pub fn get(&self, block: BlockId) -> Option<&RamBlock> {
        self.blocks.get(block.0 as usize)
    }

    /// The block of that name, with its number. Found without a look at all of them.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<(BlockId, &RamBlock)> {
        let at = self.sorted.binary_search_by_key(&name, |at| self.blocks[*at].name()).ok()?;
        let number = *self.sorted.get(at)?;
        Some((BlockId(u32::try_from(number).ok()?), self.blocks.get(number)?))
    }

    /// All pages of a block.
    #[must_use]
    pub fn run_of(&self, block: BlockId) -> Option<PageRun> {
        let pages = self.get(block)?.pages();
        Some(PageRun::new(block, PageIndex(0), pages))
    }

    /// All pages of all blocks, a run per block.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> {
        self.iter().map(|(id, block)| PageRun::new(id, PageIndex(0), block.pages()))
    }

    /// The part of `run`, from its first page on, that lies in the layout. Empty if its first page does not.
    #[must_use]
    pub fn clip(&self, run: PageRun) -> PageRun {
        let whole = self.run_of(run.block).unwrap_or(PageRun::new(run.block, PageIndex(0), PageCount(0)));
        run.intersect(whole)
    }

    /// Length of all blocks together.
    #[must_use]
    pub fn total(&self) -> ByteLen {
        ByteLen(self.blocks.iter().map(|block| block.length().0).sum())
    }

    /// Whether every page of `run` exists.
    #[must_use]
    pub fn contains(&self, run: PageRun) -> bool {
        let end = run.first.checked_add(run.pages);
        self.get(run.block).zip(end).is_some_and(|(block, end)| end.0 <= block.pages().0)
    }
}

/// Why a block or a layout cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// A block's length is not a multiple of 4096 bytes.
    PartialPage {
        /// The block's name.
        block: String,
        /// Its length.
        length: ByteLen,
    },
    /// Two blocks have the same name.
    DuplicateName {
        /// The name.
        block: String,
    },
    /// More blocks or bytes than can be counted.
    TooLarge,
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayoutError::PartialPage { block, length } => {
                write!(f, "RAM block \"{block}\" is {length} bytes long, not a whole number of {PAGE_SIZE}-byte pages")
            }
            LayoutError::DuplicateName { block } => write!(f, "two RAM blocks are named \"{block}\""),
            LayoutError::TooLarge => f.write_str("the RAM blocks are too many or too long to be counted"),
        }
    }
}

impl Error for LayoutError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockId;

    #[test]
    fn hostile_layouts_are_refused() {
        assert!(RamBlock::new("a", ByteLen(4097), PageSize::SMALL).is_err());
        let block = |name: &str, length| RamBlock::new(name, ByteLen(length), PageSize::SMALL).unwrap();
        assert_eq!(
            Layout::new(vec![block("a", 4096), block("a", 8192)]),
            Err(LayoutError::DuplicateName { block: "a".into() })
        );
        let half = (u64::MAX / 2 + 1) & !(PAGE_SIZE - 1);
        assert_eq!(Layout::new(vec![block("a", half), block("b", half)]), Err(LayoutError::TooLarge));
        assert!(PageSize::new(3 << 12).is_none() && PageSize::new(2048).is_none());
    }

    /// A look at all of them for each would take minutes.
    #[test]
    fn blocks_are_found_among_many() {
        let name = |at: u32| format!("{}", at.wrapping_mul(0x9e37_79b9));
        let block = |at: u32| RamBlock::new(name(at), ByteLen(4096), PageSize::SMALL).unwrap();
        let layout = Layout::new((0..100_000).map(block).collect()).unwrap();
        for at in 0..100_000 {
            assert_eq!(layout.find(&name(at)).map(|(id, block)| (id, block.name())), Some((BlockId(at), &*name(at))));
        }
        assert!(layout.find("").is_none() && layout.find("x").is_none() && layout.find(&name(100_000)).is_none());
        assert!(Layout::default().find("").is_none());
    }

    #[test]
    fn runs_are_checked_against_the_blocks() {
        let layout = Layout::new(vec![RamBlock::new("a", ByteLen(8192), PageSize::SMALL).unwrap()]).unwrap();
        assert!(layout.contains(PageRun::new(BlockId(0), PageIndex(1), PageCount(1))));
        assert!(!layout.contains(PageRun::new(BlockId(0), PageIndex(1), PageCount(2))));
        assert!(!layout.contains(PageRun::new(BlockId(0), PageIndex(u64::MAX), PageCount(2))));
        assert!(!layout.contains(PageRun::new(BlockId(1), PageIndex(0), PageCount(1))));
    }
}
