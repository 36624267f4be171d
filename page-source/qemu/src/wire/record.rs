//! Pages on the wire (QEMU migration/ram.c, `RAM_SAVE_FLAG_*`): a word of offset and flags, the name of the block
//! unless it is that of the record before, then the page.

use std::io::{self, Read};

use page_units::{PAGE_SIZE, PageIndex};

/// All zero; one byte 0 follows.
pub const ZERO: u64 = 0x02;
/// The list of RAM blocks follows.
pub const MEM_SIZE: u64 = 0x04;
/// 4096 bytes follow.
pub const PAGE: u64 = 0x08;
/// End of the section.
pub const END: u64 = 0x10;
/// The block is that of the record before.
pub const CONTINUE: u64 = 0x20;

const PAGE_BYTES: usize = 4096;

/// Appends the record of a page with content. `same` leaves out the name of the block: only right if the record before,
/// on the same channel, is one of the same block.
///
/// # Panics
/// If the name is longer than 255 bytes, or the content is not 4096 bytes long.
pub fn push_page(to: &mut Vec<u8>, block: &str, page: PageIndex, same: bool, content: &[u8]) {
    assert_eq!(content.len(), PAGE_BYTES, "a partial page");
    push_page_header(to, block, page, same);
    to.extend_from_slice(content);
}

/// Appends the record of a page, but for its content: 4096 bytes that have to follow. `same` as in [`push_page`].
///
/// # Panics
/// If the name is longer than 255 bytes.
pub fn push_page_header(to: &mut Vec<u8>, block: &str, page: PageIndex, same: bool) {
    push_header(to, block, page, PAGE, same);
}

/// Appends the record of a zero page; `same` as in [`push_page`].
///
/// # Panics
/// If the name is longer than 255 bytes.
pub fn push_zero(to: &mut Vec<u8>, block: &str, page: PageIndex, same: bool) {
    push_header(to, block, page, ZERO, same);
    to.push(0);
}

fn push_header(to: &mut Vec<u8>, block: &str, page: PageIndex, kind: u64, same: bool) {
    let flags = if same { kind | CONTINUE } else { kind };
    to.extend_from_slice(&((page.0 * PAGE_SIZE) | flags).to_be_bytes());
    if !same {
        let length = u8::try_from(block.len()).expect("the name of a RAM block has at most 255 bytes");
        to.push(length);
        to.extend_from_slice(block.as_bytes());
    }
}

/// A record, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// A page with content, which is in the buffer.
    Page(PageIndex),
    /// A zero page.
    Zero(PageIndex),
    /// No more records in this section.
    End,
}

/// Reads the records of one channel, section after section.
#[derive(Clone, Debug, Default)]
pub struct Reader {
    block: Option<String>,
    named: bool,
}

impl Reader {
    /// A reader at the beginning of a channel.
    #[must_use]
    pub fn new() -> Reader {
        Reader::default()
    }

    /// The block of the last record.
    #[must_use]
    pub fn block(&self) -> &str {
        self.block.as_deref().unwrap_or("")
    }

    /// Whether the last record named its block, rather than leaving it to the record before.
    #[must_use]
    pub fn is_named(&self) -> bool {
        self.named
    }

    /// Reads a record; the content of a page goes into `page`.
    ///
    /// # Errors
    /// The reader's own; [`InvalidData`](io::ErrorKind::InvalidData) for anything but pages and the end, and for a
    /// record of "the same block" where there is none.
    pub fn next(&mut self, from: &mut impl Read, page: &mut [u8; 4096]) -> io::Result<Record> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let mut word = [0; 8];
        from.read_exact(&mut word)?;
        let word = u64::from_be_bytes(word);
        let (offset, flags) = (word & !(PAGE_SIZE - 1), word & (PAGE_SIZE - 1));
        let index = PageIndex(offset / PAGE_SIZE);
        if flags == END {
            return Ok(Record::End);
        }
        self.named = flags & CONTINUE == 0;
        if self.named {
            let mut length = [0];
            from.read_exact(&mut length)?;
            let mut name = vec![0; length[0].into()];
            from.read_exact(&mut name)?;
            self.block = Some(String::from_utf8(name).map_err(|_| invalid("the name of a RAM block is not text"))?);
        } else if self.block.is_none() {
            return Err(invalid("a page of \"the same RAM block\" where none was named"));
        }
        match flags & !CONTINUE {
            PAGE => {
                from.read_exact(page)?;
                Ok(Record::Page(index))
            }
            ZERO => {
                let mut fill = [0];
                from.read_exact(&mut fill)?;
                if fill != [0] {
                    return Err(invalid("a \"zero\" page that is filled with something else"));
                }
                Ok(Record::Zero(index))
            }
            _ => Err(invalid("flags that are not those of a page")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back() {
        let mut wire = Vec::new();
        push_page(&mut wire, "pc.ram", PageIndex(3), false, &[7; 4096]);
        push_page(&mut wire, "pc.ram", PageIndex(4), true, &[9; 4096]);
        push_zero(&mut wire, "pc.rom", PageIndex(1), false);
        wire.extend_from_slice(&END.to_be_bytes());
        assert_eq!(wire[..15], [0, 0, 0, 0, 0, 0, 0x30, 0x08, 6, b'p', b'c', b'.', b'r', b'a', b'm']);
        let (mut from, mut reader, mut page) = (wire.as_slice(), Reader::new(), [0; 4096]);
        assert_eq!(reader.next(&mut from, &mut page).unwrap(), Record::Page(PageIndex(3)));
        assert_eq!((reader.block(), page), ("pc.ram", [7; 4096]));
        assert_eq!(reader.next(&mut from, &mut page).unwrap(), Record::Page(PageIndex(4)));
        assert_eq!(page, [9; 4096]);
        assert_eq!(reader.next(&mut from, &mut page).unwrap(), Record::Zero(PageIndex(1)));
        assert_eq!(reader.block(), "pc.rom");
        assert_eq!(reader.next(&mut from, &mut page).unwrap(), Record::End);
        assert!(from.is_empty());
    }

    #[test]
    fn hostile_records_are_refused() {
        let mut page = [0; 4096];
        for word in [PAGE | CONTINUE, ZERO | CONTINUE, MEM_SIZE, 0x40, 0x80, 0x200, PAGE | ZERO, 0] {
            let mut wire = word.to_be_bytes().to_vec();
            wire.extend_from_slice(&[1, b'a', 1]);
            wire.resize(5000, 1);
            assert!(Reader::new().next(&mut wire.as_slice(), &mut page).is_err(), "{word:#x}");
        }
        let mut filled = ZERO.to_be_bytes().to_vec();
        filled.extend_from_slice(&[1, b'a', 0xff]);
        assert!(Reader::new().next(&mut filled.as_slice(), &mut page).is_err());
    }
}
