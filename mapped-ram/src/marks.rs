//! Which pages of a block a writer has stored. Many threads change it, and it takes no memory where nothing was ever
//! stored: a source of a few KiB may claim RAM without end.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use page_units::{ByteLen, PageCount, PageIndex};

use crate::header::bitmap_len;

/// Words that are allocated together: 4 KiB, 128 MiB of RAM.
const WORDS: usize = 512;
const CHUNK_PAGES: u64 = WORDS as u64 * 64;
const CHUNK_BYTES: usize = WORDS * 8;

type Chunk = Box<[AtomicU64; WORDS]>;

#[derive(Debug)]
pub(crate) struct Marks {
    chunks: Box<[OnceLock<Chunk>]>,
    len: ByteLen,
}

impl Marks {
    /// None of so many pages is stored.
    pub(crate) fn new(pages: PageCount) -> Marks {
        let chunks = (0..pages.0.div_ceil(CHUNK_PAGES)).map(|_| OnceLock::new()).collect();
        Marks { chunks, len: bitmap_len(pages) }
    }

    fn chunk(&self, page: PageIndex) -> Option<&OnceLock<Chunk>> {
        self.chunks.get(usize::try_from(page.0 / CHUNK_PAGES).ok()?)
    }

    /// The word of a page, if something was ever stored near it.
    fn word(&self, page: PageIndex) -> Option<&AtomicU64> {
        word(self.chunk(page)?.get()?, page)
    }

    /// Marks pages, of the 64 among which is `page`.
    pub(crate) fn set(&self, page: PageIndex, bits: u64) {
        let Some(chunk) = self.chunk(page) else { return };
        let chunk = chunk.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
        if let Some(word) = word(chunk, page) {
            word.fetch_or(bits, Ordering::Release);
        }
    }

    /// Takes marks away, of the 64 pages among which is `page`.
    pub(crate) fn clear(&self, page: PageIndex, bits: u64) {
        if let Some(word) = self.word(page) {
            word.fetch_and(!bits, Ordering::Release);
        }
    }

    pub(crate) fn is_set(&self, page: PageIndex) -> bool {
        self.word(page).is_some_and(|word| word.load(Ordering::Acquire) >> (page.0 % 64) & 1 == 1)
    }

    pub(crate) fn count(&self) -> PageCount {
        let words = self.chunks.iter().filter_map(OnceLock::get).flat_map(|chunk| chunk.iter());
        PageCount(words.map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum())
    }

    /// The pieces of the bitmap that may have a bit set, as the file has them, and how far from its beginning they are.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (ByteLen, Vec<u8>)> {
        let chunks = (0u64..).step_by(CHUNK_BYTES).zip(&self.chunks);
        chunks.filter_map(|(at, chunk)| {
            let words = chunk.get()?.iter();
            let mut bytes: Vec<u8> = words.flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect();
            bytes.truncate(ByteLen(self.len.0.saturating_sub(at)).get());
            Some((ByteLen(at), bytes))
        })
    }
}

fn word(chunk: &Chunk, page: PageIndex) -> Option<&AtomicU64> {
    chunk.get(usize::try_from(page.0 % CHUNK_PAGES / 64).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_without_end_cost_next_to_nothing() {
        // Pages of 16 TiB and a bit: the last piece is shorter.
        let pages = (1 << 32) + 5;
        let marks = Marks::new(PageCount(pages));
        marks.clear(PageIndex(0), u64::MAX);
        assert_eq!((marks.pieces().count(), marks.count()), (0, PageCount(0)));
        marks.set(PageIndex(1 << 20), 0b110);
        marks.set(PageIndex(pages - 1), 1 << 4);
        assert!(marks.is_set(PageIndex((1 << 20) + 2)) && !marks.is_set(PageIndex(1 << 20)));
        assert!(
            marks.is_set(PageIndex(pages - 1)) && !marks.is_set(PageIndex(0)) && !marks.is_set(PageIndex(u64::MAX))
        );
        let pieces: Vec<_> = marks.pieces().collect();
        let mut first = vec![0; CHUNK_BYTES];
        first[0] = 0b110;
        assert_eq!(pieces, [(ByteLen(1 << 17), first), (ByteLen(1 << 29), vec![16, 0, 0, 0, 0, 0, 0, 0])]);
        marks.clear(PageIndex(1 << 20), 0b10);
        assert_eq!(marks.count(), PageCount(2));
    }
}
