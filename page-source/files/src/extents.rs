//! Which pages of a file are there and which are holes, so far as somebody has looked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_units::{FileOffset, PAGE_SIZE, PageCount, PageIndex};
use parking_lot::RwLock;

use page_source::{Content, Span};

/// The known spans of one block of a flat file. Readers hold a lock for the time of a look-up only; writers for the
/// time of an insertion, never during a system call.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    /// First page to (page after the last, what they are). Disjoint; neighbours differ.
    spans: RwLock<BTreeMap<u64, (u64, Content)>>,
}

impl Extents {
    /// What is known of `page` and those behind it, if anything.
    pub(crate) fn at(&self, page: PageIndex) -> Option<Span> {
        look_up(&self.spans.read(), page)
    }

    /// The same, but nothing if somebody is writing just now.
    pub(crate) fn at_without_waiting(&self, page: PageIndex) -> Option<Span> {
        look_up(&*self.spans.try_read()?, page)
    }

    /// What is known of `page` and those behind it; where that is nothing, of how many (at least one).
    pub(crate) fn known_or_unknown(&self, page: PageIndex) -> Span {
        let spans = self.spans.read();
        look_up(&spans, page).unwrap_or_else(|| {
            let next = spans.range(page.0..).next().map_or(u64::MAX, |(first, _)| *first);
            Span { content: Content::Unknown, pages: PageCount((next - page.0).max(1)) }
        })
    }

    /// Remembers that the pages from `first` up to `end` are `content`, so far as nothing is known of them.
    pub(crate) fn learn(&self, first: PageIndex, end: PageIndex, content: Content) {
        let (mut first, mut end) = (first.0, end.0);
        let mut spans = self.spans.write();
        if let Some((&start, &(stop, old))) = spans.range(..=first).next_back() {
            if stop > first {
                return;
            }
            if stop == first && old == content {
                first = start;
            }
        }
        if let Some((&start, &(stop, old))) = spans.range(first + 1..).next() {
            end = end.min(start);
            if end == start && old == content {
                spans.remove(&start);
                end = stop;
            }
        }
        spans.insert(first, (end, content));
    }
}

fn look_up(spans: &BTreeMap<u64, (u64, Content)>, page: PageIndex) -> Option<Span> {
    let (_, &(end, content)) = spans.range(..=page.0).next_back()?;
    (page.0 < end).then(|| Span { content, pages: PageCount(end - page.0) })
}

/// What the file system tells of the pages of a block from `first` on: which kind, and the page after the last.
///
/// `base` is where the block starts in the file, `size` the length of the file. A page that has even one byte
/// outside a hole is [`Content::Stored`]. Where the file system knows nothing of holes, all is stored.
pub(crate) fn seek(file: &File, base: FileOffset, first: PageIndex, size: u64) -> io::Result<(Content, PageIndex)> {
    let everything = (Content::Stored, PageIndex(u64::MAX));
    let from = base.0.saturating_add(first.byte_offset().0);
    let Ok(at) = i64::try_from(from) else {
        return Ok(everything);
    };
    let data = match lseek(file, at, Whence::SeekData) {
        Ok(data) => data.cast_unsigned(),
        // No data up to the end of the file: the last page may be partial, or be there only in part.
        Err(Errno::ENXIO) if from < size => return Ok((Content::Zero, PageIndex((size - base.0).div_ceil(PAGE_SIZE)))),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENXIO) => return Ok(everything),
        Err(error) => return Err(error.into()),
    };
    let hole = data.saturating_sub(base.0) / PAGE_SIZE;
    if hole > first.0 {
        return Ok((Content::Zero, PageIndex(hole)));
    }
    match lseek(file, data.max(from).cast_signed(), Whence::SeekHole) {
        Ok(end) => {
            let end = end.cast_unsigned().saturating_sub(base.0).div_ceil(PAGE_SIZE);
            Ok((Content::Stored, PageIndex(end.max(first.0 + 1))))
        }
        Err(Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENXIO) => Ok(everything),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn at(extents: &Extents, page: u64) -> Option<(Content, u64)> {
        extents.at(PageIndex(page)).map(|span| (span.content, span.pages.0))
    }

    #[test]
    fn neighbours_of_one_kind_become_one_span() {
        use Content::{Stored, Zero};
        let extents = Extents::default();
        let learn = |first, end, content| extents.learn(PageIndex(first), PageIndex(end), content);
        learn(10, 20, Stored);
        learn(0, 5, Zero);
        assert_eq!((at(&extents, 0), at(&extents, 5), at(&extents, 19)), (Some((Zero, 5)), None, Some((Stored, 1))));
        learn(5, 30, Stored);
        assert_eq!((at(&extents, 5), at(&extents, 4)), (Some((Stored, 15)), Some((Zero, 1))));
        learn(20, 40, Zero);
        learn(40, 41, Zero);
        learn(12, 13, Zero);
        assert_eq!((at(&extents, 20), at(&extents, 12)), (Some((Zero, 21)), Some((Stored, 8))));
        assert_eq!(extents.spans.read().len(), 3);
    }

    #[test]
    fn a_page_that_is_partly_data_is_data() {
        let file = tempfile::tempfile().unwrap();
        let base = FileOffset(0x800);
        file.set_len(0x800 + (1 << 20) + 100).unwrap();
        file.write_all_at(&[1; 4096], 0x10000).unwrap();
        let size = file.metadata().unwrap().len();
        let first = seek(&file, base, PageIndex(0), size).unwrap();
        if first.0 == Content::Stored {
            return assert_eq!(first.1, PageIndex(u64::MAX), "a file system without holes");
        }
        // Data is at 0x10000..0x11000: half of pages 15 and 16.
        assert_eq!(first, (Content::Zero, PageIndex(15)));
        assert_eq!(seek(&file, base, PageIndex(15), size).unwrap(), (Content::Stored, PageIndex(17)));
        assert_eq!(seek(&file, base, PageIndex(16), size).unwrap(), (Content::Stored, PageIndex(17)));
        assert_eq!(seek(&file, base, PageIndex(17), size).unwrap(), (Content::Zero, PageIndex(257)));
    }
}
