//! Finding zero pages.

use std::io;
use std::ops::ControlFlow;

use page_units::{ByteLen, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex, PageRun};

use crate::{PageBytes, PageSink, Reply};

/// A page in memory.
pub(crate) const PAGE: usize = 1 << PAGE_SHIFT;
/// How much of a mapped file is brought into user memory at a time.
const CHUNK: usize = 64 << 10;

/// Whether a page (or any length of bytes) is all zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    static ZEROS: [u8; PAGE] = [0; PAGE];
    // A comparison of memory, which the C library does as fast as the machine can, and which ends at the first
    // difference.
    bytes.chunks(PAGE).all(|page| *page == ZEROS[..page.len()])
}

/// Gives the pages of `run`, whose content is `bytes`, to `sink`: zero pages as zero, and the others as what was looked
/// at, so that they are not read twice. `unreadable` is told of pages that could not be read, and its reply is passed on.
pub fn deliver_without_zeros(
    sink: &dyn PageSink,
    run: PageRun,
    bytes: PageBytes<'_>,
    unreadable: impl FnOnce(PageRun, io::Error) -> Reply,
) -> Reply {
    Deliver { sink, zeros: PageRun::new(run.block, run.first, PageCount(0)) }.all(run, bytes, unreadable).into()
}

struct Deliver<'a> {
    sink: &'a dyn PageSink,
    /// Zero pages that have not been told yet: they go on over the end of a chunk.
    zeros: PageRun,
}

impl Deliver<'_> {
    fn all(
        &mut self,
        run: PageRun,
        bytes: PageBytes<'_>,
        unreadable: impl FnOnce(PageRun, io::Error) -> Reply,
    ) -> ControlFlow<Reply> {
        let mut buffer = Vec::new();
        let mut at = ByteLen(0);
        let mut rest = run;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(PageCount(CHUNK as u64 / PAGE_SIZE));
            let lent = bytes.slice(at, now.len());
            let chunk = match lent.as_slice() {
                Some(slice) => slice,
                None => {
                    buffer.resize(now.len().get(), 0);
                    if let Err(error) = lent.copy_to(&mut buffer) {
                        self.tell_zeros(now.first)?;
                        return unreadable(rest, error).branch();
                    }
                    &buffer
                }
            };
            self.chunk(now, chunk)?;
            at += now.len();
            rest = later;
        }
        self.tell_zeros(rest.first)
    }

    fn chunk(&mut self, run: PageRun, mut content: &[u8]) -> ControlFlow<Reply> {
        let mut left = run;
        while !left.is_empty() {
            let (zero, pages) = first_kind(content);
            let (kind, others) = left.split_at(pages);
            let (bytes, next) = content.split_at(kind.len().get());
            if zero {
                self.zeros.pages += kind.pages;
            } else {
                self.tell_zeros(kind.end())?;
                self.sink.data(kind, PageBytes::from_slice(bytes)).branch()?;
            }
            (left, content) = (others, next);
        }
        ControlFlow::Continue(())
    }

    /// Tells of the zeros that have gathered; those that come next begin at `next`.
    fn tell_zeros(&mut self, next: PageIndex) -> ControlFlow<Reply> {
        let zeros = self.zeros;
        self.zeros = PageRun::new(zeros.block, next, PageCount(0));
        if zeros.is_empty() { ControlFlow::Continue(()) } else { self.sink.zero(zeros).branch() }
    }
}

/// Whether the first page is zero, and how many are like it.
fn first_kind(bytes: &[u8]) -> (bool, PageCount) {
    let mut kinds = bytes.chunks(PAGE).map(is_zero);
    let zero = kinds.next().unwrap_or(true);
    let same = kinds.take_while(|kind| *kind == zero).count();
    (zero, PageCount(same as u64 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        let mut bytes = vec![0; 2 * PAGE];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 1, 63, 64, 65, PAGE - 1, PAGE, PAGE + 64, 2 * PAGE - 1] {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "byte {at}");
            bytes[at] = 0;
        }
    }
}
