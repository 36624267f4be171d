//! Finding zero pages.

use std::io;
use std::ops::ControlFlow;

use page_units::{ByteLen, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRun};

use crate::{Flow, PageBytes, PageSink};

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
/// at, so that they are not read twice. `unreadable` is told of pages that could not be read, and its answer is passed
/// on.
pub fn deliver_without_zeros(
    sink: &dyn PageSink,
    run: PageRun,
    bytes: PageBytes<'_>,
    unreadable: impl FnOnce(PageRun, io::Error) -> Flow,
) -> Flow {
    let mut buffer = Vec::new();
    // Zero pages that have not been told yet: they go on over the end of a chunk.
    let mut zeros = PageRun::new(run.block, run.first, PageCount(0));
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
                    if !zeros.is_empty() {
                        sink.zero(zeros)?;
                    }
                    return unreadable(rest, error);
                }
                &buffer
            }
        };
        let mut left = now;
        let mut content = chunk;
        while !left.is_empty() {
            let (zero, pages) = first_kind(content);
            let (kind, others) = left.split_at(pages);
            let (bytes, next) = content.split_at(kind.len().get());
            if zero {
                zeros.pages += kind.pages;
            } else {
                if !zeros.is_empty() {
                    sink.zero(zeros)?;
                }
                sink.data(kind, PageBytes::from_slice(bytes))?;
                zeros = PageRun::new(run.block, kind.end(), PageCount(0));
            }
            (left, content) = (others, next);
        }
        at += now.len();
        rest = later;
    }
    if zeros.is_empty() { ControlFlow::Continue(()) } else { sink.zero(zeros) }
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
