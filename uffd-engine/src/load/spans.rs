//! What a source may have content for.

use page_source::{Content, Pages};
use page_units::{ByteLen, PageCount};

use crate::memory::Area;

/// How far the source is asked at a time what it knows: 1 GiB.
pub(super) const LOOK_AHEAD: PageCount = PageCount(1 << 18);
/// 2 MiB of small pages: poisoning them costs much more than the call.
const TOGETHER: usize = 512;

/// The granules of an area that a source does not know to be zero: the first of a span, and how many. A source that knows
/// nothing yet says so page by page: up to [`TOGETHER`] of these are one span.
pub(crate) fn stored<'a>(area: &'a Area, source: &'a dyn Pages) -> impl Iterator<Item = (usize, usize)> + 'a {
    let mut at = 0;
    std::iter::from_fn(move || {
        let mut found: Option<(usize, usize)> = None;
        while at < area.granules {
            let span = source.content(area.pages(at, area.granules - at).split_at(LOOK_AHEAD).0);
            let granules = ByteLen(span.pages.0 / area.granule.0).get();
            let left = area.granules - at;
            if span.content == Content::Zero && granules > 0 {
                if found.is_some() {
                    break;
                }
                at += granules.min(left);
                continue;
            }
            let granules = granules.clamp(1, left);
            at += granules;
            let (first, before) = found.unwrap_or((at - granules, 0));
            found = Some((first, before + granules));
            if before + granules >= TOGETHER {
                break;
            }
        }
        found
    })
}

#[cfg(test)]
mod tests {
    use page_source::Span;
    use page_units::{BlockId, HostAddr, Layout, PageIndex, PageRun, PageSize, RamBlock};

    use super::*;
    use crate::memory::backing::Backing;
    use crate::memory::region::Region;

    const PAGES: u64 = 2000;

    /// Knows page by page at best, and of a hundred pages that they are zero.
    #[derive(Debug)]
    struct Slow(Layout);

    impl Pages for Slow {
        fn layout(&self) -> &Layout {
            &self.0
        }

        fn content(&self, run: PageRun) -> Span {
            let content = if (1000..1100).contains(&run.first.0) { Content::Zero } else { Content::Unknown };
            Span { content, pages: PageCount(1) }
        }
    }

    #[test]
    fn what_is_told_page_by_page_comes_together() {
        let block = RamBlock::new("ram", ByteLen(PAGES * 4096), PageSize::SMALL).unwrap();
        let source = Slow(Layout::new(vec![block]).unwrap());
        let run = PageRun::new(BlockId(0), PageIndex(0), PageCount(PAGES));
        let region = Region::foreign(HostAddr(1 << 30), run, Backing::Anonymous);
        let area = Area::new(region, "ram".into());
        let spans: Vec<_> = stored(&area, &source).collect();
        assert_eq!(spans, [(0, 512), (512, 488), (1100, 512), (1612, 388)]);
    }
}
