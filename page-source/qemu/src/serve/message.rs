//! A message that is put together without copying pages: bytes of our own, and between them pages that are lent.

use page_units::{ByteLen, PageIndex};

use super::opening::{begin_part, end_part};
use super::pages::BlockPages;
use crate::wire::record;
use page_source::PageBytes;

/// Bytes of our own in most messages.
const ROOM: usize = 1024;

/// A message on its way.
#[derive(Debug, Default)]
pub(super) struct Message<'a> {
    own: Vec<u8>,
    /// Pages, each with the number of our own bytes before it.
    lent: Vec<(usize, PageBytes<'a>)>,
    lent_bytes: usize,
}

impl<'a> Message<'a> {
    /// A message without pages.
    pub(super) fn plain(bytes: Vec<u8>) -> Message<'static> {
        Message { own: bytes, ..Message::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// Its length, in bytes.
    pub(super) fn len(&self) -> usize {
        self.own.len() + self.lent_bytes
    }

    /// Where bytes of our own are appended.
    pub(super) fn own(&mut self) -> &mut Vec<u8> {
        &mut self.own
    }

    /// Appends a page of the RAM section, which begins with the first of them.
    pub(super) fn page(&mut self, block: &BlockPages, page: u64, content: Option<PageBytes<'a>>) {
        if self.is_empty() {
            self.own.reserve(ROOM);
            self.lent.reserve(ROOM / 16);
            begin_part(&mut self.own);
            self.record(block, page, content, false);
        } else {
            self.record(block, page, content, true);
        }
    }

    /// Ends the RAM section.
    pub(super) fn end(&mut self) {
        end_part(&mut self.own);
    }

    /// Appends a page outside of sections, as they are on the second connection.
    pub(super) fn bare_page(&mut self, block: &BlockPages, page: u64, content: Option<PageBytes<'a>>) {
        let same = !self.is_empty();
        self.record(block, page, content, same);
    }

    fn record(&mut self, block: &BlockPages, page: u64, content: Option<PageBytes<'a>>, same: bool) {
        match content {
            Some(content) => {
                record::push_page_header(&mut self.own, &block.name, PageIndex(page), same);
                self.lent.push((self.own.len(), content));
                self.lent_bytes += content.len().get();
            }
            None => record::push_zero(&mut self.own, &block.name, PageIndex(page), same),
        }
    }

    /// What goes over the wire, from byte `skip` on.
    pub(super) fn parts(&self, mut skip: usize) -> impl Iterator<Item = PageBytes<'_>> {
        let mut from = 0;
        let ends = self.lent.iter().map(|(at, page)| (*at, Some(*page))).chain([(self.own.len(), None)]);
        let parts = ends.flat_map(move |(to, page)| {
            let own = PageBytes::from_slice(self.own.get(from..to).unwrap_or_default());
            from = to;
            [Some(own), page]
        });
        parts.flatten().filter_map(move |part| {
            let gone = skip.min(part.len().get());
            skip -= gone;
            let left = part.len().get() - gone;
            (left > 0).then(|| part.slice(ByteLen::of(gone), ByteLen::of(left)))
        })
    }
}

#[cfg(test)]
mod tests {
    use page_units::{Layout, PageSize, RamBlock};

    use super::*;
    use crate::serve::pages::Pages;

    #[test]
    fn however_it_is_cut_it_is_what_the_copying_way_writes() {
        let block = RamBlock::new("ram", ByteLen(16 << 12), PageSize::SMALL).unwrap();
        let pages = Pages::new(&Layout::new(vec![block]).unwrap());
        let block = &pages.blocks[0];
        let (ones, twos) = ([1; 4096], [2; 4096]);
        let mut message = Message::default();
        message.page(block, 3, Some(PageBytes::from_slice(&ones)));
        message.page(block, 4, None);
        message.page(block, 9, Some(PageBytes::from_slice(&twos)));
        message.end();
        let mut expected = Vec::new();
        begin_part(&mut expected);
        record::push_page(&mut expected, "ram", PageIndex(3), false, &ones);
        record::push_zero(&mut expected, "ram", PageIndex(4), true);
        record::push_page(&mut expected, "ram", PageIndex(9), true, &twos);
        end_part(&mut expected);
        assert_eq!(message.len(), expected.len());
        for skip in 0..=expected.len() {
            let rest: Vec<u8> = message.parts(skip).flat_map(|part| part.as_slice().unwrap().to_vec()).collect();
            assert!(rest == expected[skip..], "{skip}");
        }
        let mut bare = Message::default();
        bare.bare_page(block, 3, Some(PageBytes::from_slice(&ones)));
        assert_eq!(bare.len(), 8 + 4 + 4096);
        assert_eq!(Message::plain(vec![7]).parts(0).count(), 1);
    }
}
