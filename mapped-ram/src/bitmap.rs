//! The bitmap of one RAM block, read piece by piece when it is first needed.
//!
//! Bit `i` (byte `i / 8`, bit `i % 8`) is set if page `i` is stored; clear pages are zero, whatever the file holds.

use std::io;
use std::sync::OnceLock;

use page_units::{ByteLen, FileOffset, PAGE_SIZE, PageCount, PageIndex};

use crate::bytes::Bytes;
use crate::header::bitmap_len;
use crate::{Identity, Watch};

/// Words of one piece: 4 KiB of bitmap, 128 MiB of RAM.
const WORDS: usize = 512;
const CHUNK_PAGES: u64 = WORDS as u64 * 64;
const CHUNK_BYTES: usize = WORDS * 8;
/// The most pieces that are read in one call.
const BATCH: u64 = 16;

/// Neighbouring pages of a block that are all stored in the file, or all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRun {
    /// How many are stored.
    Stored(PageCount),
    /// How many are zero, whatever the file holds in their place.
    Zero(PageCount),
}

impl FileRun {
    /// How many pages it has.
    #[must_use]
    pub fn pages(self) -> PageCount {
        match self {
            FileRun::Stored(pages) | FileRun::Zero(pages) => pages,
        }
    }

    /// Whether its pages are stored.
    #[must_use]
    pub fn is_stored(self) -> bool {
        matches!(self, FileRun::Stored(_))
    }
}

#[derive(Debug)]
pub(crate) struct Bitmap {
    offset: FileOffset,
    pages: PageCount,
    /// Where the file ends, counted in pages of this block.
    pages_in_file: u64,
    chunks: Box<[OnceLock<Chunk>]>,
}

#[derive(Debug)]
enum Chunk {
    /// All clear: costs nothing.
    Clear,
    /// All set.
    Set,
    Mixed(Box<[u64; WORDS]>),
}

/// What is wrong with a piece of the bitmap.
#[derive(Debug)]
pub(crate) enum BitmapError {
    Io { at: FileOffset, error: io::Error },
    BeyondBlock { at: FileOffset },
    BeyondFile { last: PageIndex },
    Changed { what: &'static str },
}

/// An open file, and what it was when it was opened.
#[derive(Debug)]
pub(crate) struct Watched<'a> {
    pub(crate) file: &'a Bytes,
    pub(crate) opened: &'a Identity,
    pub(crate) watch: Watch,
}

impl Watched<'_> {
    /// What is different now.
    pub(crate) fn difference(&self) -> io::Result<Option<&'static str>> {
        Ok(self.opened.difference(&Identity::of(self.file.file())?, self.watch))
    }
}

impl Bitmap {
    /// The bitmap at `offset` for `pages` pages, of which those from `pages_in_file` on are not in the file.
    pub(crate) fn new(offset: FileOffset, pages: PageCount, pages_in_file: u64) -> Bitmap {
        let count = usize::try_from(pages.0.div_ceil(CHUNK_PAGES)).unwrap_or(usize::MAX);
        Bitmap { offset, pages, pages_in_file, chunks: (0..count).map(|_| OnceLock::new()).collect() }
    }

    /// The run of equal pages from `first` on, as far as it is loaded and at most `most` pages; `None` if `first` is
    /// not loaded. `first` must be a page of the block.
    pub(crate) fn known(&self, first: PageIndex, most: PageCount) -> Option<FileRun> {
        let end = self.pages.0.min(first.0.saturating_add(most.0));
        let mut at = first.0;
        let mut kind = None;
        while at < end {
            let Some(chunk) = self.chunk(at) else { break };
            let chunk_start = at - at % CHUNK_PAGES;
            let chunk_end = end.min(chunk_start + CHUNK_PAGES);
            let set = *kind.get_or_insert_with(|| chunk.bit(at - chunk_start));
            at = chunk_start + chunk.run_end(set, at - chunk_start, chunk_end - chunk_start);
            if at < chunk_end {
                break;
            }
        }
        let pages = PageCount(at - first.0);
        kind.map(|set| if set { FileRun::Stored(pages) } else { FileRun::Zero(pages) })
    }

    /// The same, but loads what it needs.
    pub(crate) fn load(&self, file: &Watched<'_>, first: PageIndex, most: PageCount) -> Result<FileRun, BitmapError> {
        let most = PageCount(most.0.max(1));
        let end = self.pages.0.min(first.0.saturating_add(most.0));
        loop {
            match self.known(first, most) {
                Some(run) => {
                    let at = first.0 + run.pages().0;
                    let unloaded = at < end && at.is_multiple_of(CHUNK_PAGES) && self.chunk(at).is_none();
                    if !unloaded {
                        return Ok(run);
                    }
                    self.read(file, at, end)?;
                }
                None => self.read(file, first.0, end)?,
            }
        }
    }

    /// How many pages are stored.
    pub(crate) fn count(&self, file: &Watched<'_>) -> Result<PageCount, BitmapError> {
        let mut total = 0;
        for start in (0..self.pages.0).step_by(usize::try_from(CHUNK_PAGES).unwrap_or(usize::MAX)) {
            if self.chunk(start).is_none() {
                self.read(file, start, self.pages.0)?;
            }
            total += match self.chunk(start) {
                Some(Chunk::Set) => CHUNK_PAGES.min(self.pages.0 - start),
                Some(Chunk::Mixed(words)) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
                Some(Chunk::Clear) | None => 0,
            };
        }
        Ok(PageCount(total))
    }

    fn chunk(&self, page: u64) -> Option<&Chunk> {
        let index = usize::try_from(page / CHUNK_PAGES).ok()?;
        self.chunks.get(index)?.get()
    }

    /// Reads the piece of `page` and those after it up to `end`, at most a batch. Several threads may read the same
    /// piece, and find the same in it.
    fn read(&self, file: &Watched<'_>, page: u64, end: u64) -> Result<(), BitmapError> {
        let first = page / CHUNK_PAGES;
        let last = end.div_ceil(CHUNK_PAGES).clamp(first + 1, first + BATCH);
        let from = first * CHUNK_BYTES as u64;
        let to = (last * CHUNK_BYTES as u64).min(bitmap_len(self.pages).0);
        let at = FileOffset(self.offset.0.saturating_add(from));
        let mut bytes = vec![0; ByteLen(to.saturating_sub(from)).get()];
        let read = file.file.read_exact_at(&mut bytes, at.0);
        // After it was read and before anybody believes it: what is published stays.
        if let Some(what) = file.difference().map_err(|error| BitmapError::Io { at, error })? {
            return Err(BitmapError::Changed { what });
        }
        read.map_err(|error| BitmapError::Io { at, error })?;
        for (number, bytes) in (first..last).zip(bytes.chunks(CHUNK_BYTES)) {
            let chunk = self.check(number, bytes)?;
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            if let Some(place) = self.chunks.get(index) {
                // Another thread may have set the same before.
                let _ = place.set(chunk);
            }
        }
        Ok(())
    }

    /// Makes a piece of its bytes, if no bit is set where there is no page.
    fn check(&self, number: u64, bytes: &[u8]) -> Result<Chunk, BitmapError> {
        let start = number * CHUNK_PAGES;
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(Chunk::Clear);
        }
        let mut words = Box::new([0; WORDS]);
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        let last_set = words.iter().rposition(|word| *word != 0).map_or(0, |index| {
            let top = 63 - words[index].leading_zeros();
            start + index as u64 * 64 + u64::from(top)
        });
        if last_set >= self.pages.0 {
            return Err(BitmapError::BeyondBlock { at: FileOffset(self.offset.0.saturating_add(last_set / 8)) });
        }
        if last_set >= self.pages_in_file {
            return Err(BitmapError::BeyondFile { last: PageIndex(last_set) });
        }
        if words.iter().all(|word| *word == u64::MAX) {
            return Ok(Chunk::Set);
        }
        Ok(Chunk::Mixed(words))
    }
}

impl Chunk {
    fn bit(&self, page: u64) -> bool {
        match self {
            Chunk::Clear => false,
            Chunk::Set => true,
            Chunk::Mixed(words) => word(words, page) >> (page % 64) & 1 == 1,
        }
    }

    /// The first page from `from` on that is not `set`, at most `end`. All numbers count from the piece's first page.
    fn run_end(&self, set: bool, from: u64, end: u64) -> u64 {
        match self {
            Chunk::Clear => {
                if set {
                    from
                } else {
                    end
                }
            }
            Chunk::Set => {
                if set {
                    end
                } else {
                    from
                }
            }
            Chunk::Mixed(words) => {
                let mut at = from;
                while at < end {
                    let bits = word(words, at);
                    let others = if set { !bits } else { bits } >> (at % 64);
                    if others != 0 {
                        return end.min(at + u64::from(others.trailing_zeros()));
                    }
                    at = at - at % 64 + 64;
                }
                end
            }
        }
    }
}

fn word(words: &[u64; WORDS], page: u64) -> u64 {
    usize::try_from(page / 64).ok().and_then(|index| words.get(index)).copied().unwrap_or(0)
}

/// How many whole pages fit between `start` and `end` of a file.
pub(crate) fn pages_between(start: FileOffset, end: FileOffset) -> u64 {
    end.0.saturating_sub(start.0) / PAGE_SIZE
}
