//! Which pages of a block have been written to a file in the making. Takes memory only where there are some: a snapshot of
//! a few KiB may claim terabytes of RAM, and is copied like any other.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use page_units::{ByteLen, PageCount, PageIndex};

/// Words that are allocated together: 4 KiB of bitmap, 128 MiB of RAM.
const WORDS: usize = 512;
const CHUNK_PAGES: u64 = WORDS as u64 * 64;

type Chunk = Box<[AtomicU64; WORDS]>;

#[derive(Debug)]
pub(crate) struct WrittenBitmap {
    chunks: Box<[OnceLock<Chunk>]>,
    /// Words of the bitmap; the last chunk has some more.
    words: u64,
}

impl WrittenBitmap {
    /// A bitmap in which nothing is set.
    pub(crate) fn new(pages: PageCount) -> WrittenBitmap {
        let chunks = (0..pages.0.div_ceil(CHUNK_PAGES)).map(|_| OnceLock::new()).collect();
        WrittenBitmap { chunks, words: pages.0.div_ceil(64) }
    }

    /// Sets the bits of a run.
    pub(crate) fn set(&self, first: PageIndex, pages: PageCount) {
        self.each_word(first, pages, |chunk, word, bits| {
            let chunk = chunk.get_or_init(|| Box::new([const { AtomicU64::new(0) }; WORDS]));
            if let Some(word) = chunk.get(word) {
                word.fetch_or(bits, Ordering::Release);
            }
        });
    }

    /// Clears the bits of a run.
    pub(crate) fn clear(&self, first: PageIndex, pages: PageCount) {
        self.each_word(first, pages, |chunk, word, bits| {
            if let Some(word) = chunk.get().and_then(|chunk| chunk.get(word)) {
                word.fetch_and(!bits, Ordering::Release);
            }
        });
    }

    fn each_word(&self, first: PageIndex, pages: PageCount, change: impl Fn(&OnceLock<Chunk>, usize, u64)) {
        let end = first.0.saturating_add(pages.0);
        let mut at = first.0;
        while at < end {
            let next = end.min((at / 64 + 1) * 64);
            let bits = u64::MAX >> (64 - (next - at)) << (at % 64);
            if let Some((chunk, word)) = self.place(PageIndex(at)) {
                change(chunk, word, bits);
            }
            at = next;
        }
    }

    fn place(&self, page: PageIndex) -> Option<(&OnceLock<Chunk>, usize)> {
        let chunk = self.chunks.get(usize::try_from(page.0 / CHUNK_PAGES).ok()?)?;
        Some((chunk, usize::try_from(page.0 % CHUNK_PAGES / 64).ok()?))
    }

    /// Counts the bits that are set.
    pub(crate) fn count(&self) -> PageCount {
        let words = self.chunks.iter().filter_map(OnceLock::get).flat_map(|chunk| chunk.iter());
        PageCount(words.map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum())
    }

    /// The parts of the bitmap in which a bit may be set: the offset of each in the bitmap, and its bytes. All else is zero.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (ByteLen, Vec<u8>)> {
        let starts = (0..self.words).step_by(WORDS);
        starts.zip(&self.chunks).filter_map(|(start, chunk)| {
            let words = usize::try_from(self.words - start).unwrap_or(WORDS).min(WORDS);
            let words = chunk.get()?.iter().take(words);
            Some((ByteLen(start * 8), words.flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl WrittenBitmap {
        /// Whether the bit of a page is set.
        fn has(&self, page: PageIndex) -> bool {
            let word = self.place(page).and_then(|(chunk, word)| chunk.get()?.get(word));
            word.is_some_and(|word| word.load(Ordering::Acquire) >> (page.0 % 64) & 1 == 1)
        }
    }

    #[test]
    fn bits_are_those_of_the_runs_and_cost_memory_only_there() {
        // As many pages as 64 TiB have, and a few more.
        let pages = (1 << 34) + 100;
        let written = WrittenBitmap::new(PageCount(pages));
        let runs = [(5, 1), (63, 2), (CHUNK_PAGES - 3, 70), (pages - 7, 7)];
        for (first, count) in runs {
            written.set(PageIndex(first), PageCount(count));
        }
        assert_eq!(written.count(), PageCount(80));
        written.clear(PageIndex(CHUNK_PAGES - 2), PageCount(1));
        written.clear(PageIndex(1 << 30), PageCount(1 << 20));
        for (first, count) in runs {
            assert!((first..first + count).all(|page| written.has(PageIndex(page)) == (page != CHUNK_PAGES - 2)));
            assert!(!written.has(PageIndex(first - 1)) && !written.has(PageIndex(first + count)));
        }
        let parts: Vec<_> = written.parts().collect();
        let places: Vec<_> = parts.iter().map(|(at, bytes)| (at.0, bytes.len())).collect();
        assert_eq!(places, [(0, 4096), (4096, 4096), ((1 << 31), 16)]);
        assert_eq!(parts[2].1[11..13], [0xe0, 0x0f]);
    }
}
