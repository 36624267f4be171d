//! Which content is worth bringing in before the gate is entered: a disk read inside it would hold up every reader of
//! events.
//!
//! Asking for each page would cost half as much as installing it. So it is asked once for each piece, and remembered
//! where nothing had to be waited for. What leaves the page cache later is read inside the gate after all.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use page_source::PageBytes;
use page_units::ByteLen;

use crate::memory::Area;

/// How much memory one answer stands for.
const PIECE: ByteLen = ByteLen(2 << 20);

/// The longest that content in memory takes to be brought, for each page. A disk takes longer.
const AT_ONCE: Duration = Duration::from_micros(10);

/// One bit for each piece of each area: its content seems to be in memory.
#[derive(Debug)]
pub(crate) struct Residency {
    areas: Vec<Box<[AtomicU64]>>,
}

impl Residency {
    pub(crate) fn new(areas: &[Area]) -> Residency {
        let words = |area: &Area| ByteLen(area.region.len().0.div_ceil(PIECE.0)).get().div_ceil(64);
        let of = |area: &Area| std::iter::repeat_with(AtomicU64::default).take(words(area)).collect();
        Residency { areas: areas.iter().map(of).collect() }
    }

    /// Brings the content of some granules of an area into memory, unless that of their piece is known to be there. The
    /// caller holds nothing.
    pub(crate) fn bring(&self, number: usize, area: &Area, first: usize, bytes: PageBytes<'_>) {
        let piece = ByteLen(area.len_of(first).0 / PIECE.0).get();
        let (word, bit) = (&self.areas[number][piece / 64], 1 << (piece % 64));
        if word.load(Ordering::Relaxed) & bit != 0 {
            return;
        }
        let begin = Instant::now();
        bytes.bring();
        let pages = u32::try_from(bytes.len().to_pages().0).unwrap_or(u32::MAX);
        if begin.elapsed() <= AT_ONCE * pages.clamp(1, 16) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use page_units::{BlockId, HostAddr, PageCount, PageIndex, PageRun};

    use super::*;
    use crate::memory::backing::Backing;
    use crate::memory::region::Region;

    #[test]
    fn content_in_memory_is_asked_for_once_in_each_piece() {
        let run = PageRun::new(BlockId(0), PageIndex(0), PageCount(1025));
        let area = Area::new(Region::foreign(HostAddr(1 << 30), run, Backing::Anonymous), "ram".into());
        let residency = Residency::new(std::slice::from_ref(&area));
        let known = || residency.areas[0][0].load(Ordering::Relaxed);
        let page = [0; 4096];
        // Ordinary memory takes no time; an interrupted thread may be asked once more.
        while known() & 0b100 == 0 {
            residency.bring(0, &area, 1024, PageBytes::from_slice(&page));
        }
        assert_eq!(known(), 0b100);
    }
}
