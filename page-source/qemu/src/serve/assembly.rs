//! Huge pages, put together: the destination takes one only as a whole, all of its small pages in a row.

use std::collections::HashMap;
use std::io;

use page_units::{BlockId, ByteLen, PAGE_SIZE};
use parking_lot::Mutex;

use page_source::PageBytes;

const PAGE: usize = 4096;

/// A huge page of which parts have come.
#[derive(Debug)]
pub(super) struct Assembly {
    bytes: Vec<u8>,
    /// For each small page: not there yet, zero, or content.
    parts: Vec<Part>,
    missing: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Missing,
    Zero,
    Content,
}

impl Assembly {
    fn new(pages: usize) -> Assembly {
        Assembly { bytes: vec![0; pages * PAGE], parts: vec![Part::Missing; pages], missing: pages }
    }

    /// Whether nothing in it has content.
    pub(super) fn is_zero(&self) -> bool {
        !self.parts.contains(&Part::Content)
    }

    /// Each small page; `None` where it is zero.
    pub(super) fn pages(&self) -> impl Iterator<Item = Option<&[u8]>> {
        let content = |(bytes, part)| if part == Part::Content { Some(bytes) } else { None };
        self.bytes.chunks_exact(PAGE).zip(self.parts.iter().copied()).map(content)
    }

    fn put(&mut self, first: usize, count: usize, content: Option<PageBytes<'_>>) -> io::Result<()> {
        for at in first..first + count {
            let Some(part) = self.parts.get_mut(at) else { break };
            if *part != Part::Missing {
                continue;
            }
            *part = match content {
                None => Part::Zero,
                Some(content) => {
                    let from = ByteLen((at - first) as u64 * PAGE_SIZE);
                    let Some(to) = self.bytes.get_mut(at * PAGE..(at + 1) * PAGE) else { break };
                    content.slice(from, ByteLen(PAGE_SIZE)).copy_to(to)?;
                    Part::Content
                }
            };
            self.missing -= 1;
        }
        Ok(())
    }
}

/// All huge pages of which parts have come.
#[derive(Debug, Default)]
pub(super) struct Assemblies(Mutex<HashMap<(u32, u64), Assembly>>);

impl Assemblies {
    /// Adds `count` small pages, from `first` on, to a huge page of `pages`. Gives it back once it is whole.
    pub(super) fn add(
        &self,
        block: BlockId,
        granule: u64,
        pages: usize,
        (first, count): (usize, usize),
        content: Option<PageBytes<'_>>,
    ) -> io::Result<Option<Assembly>> {
        let mut all = self.0.lock();
        let assembly = all.entry((block.0, granule)).or_insert_with(|| Assembly::new(pages));
        assembly.put(first, count, content)?;
        if assembly.missing > 0 {
            return Ok(None);
        }
        Ok(all.remove(&(block.0, granule)))
    }
}
