//! The records of the RAM section (QEMU `migration/ram.c`): page data inside the stream.
//!
//! The body of a RAM section, and everything on a postcopy preempt channel, is a sequence of [`Record`]s; the section's
//! body ends with [`Record::Eos`]. The first section begins with [`Record::BlockList`], which only says how many bytes
//! of RAM there are: the entries follow, and are read one by one with [`read_block`] (or, for mapped-ram, by whoever
//! knows what else is in them) until their lengths add up.

use std::io::{Read, Write};

use page_units::PAGE_SIZE;

use crate::command::push_counted;
use crate::{EncodeError, StreamError, StreamReader};

/// The bytes of a page.
pub type Page = [u8; PAGE_SIZE as usize];

/// Name of the section.
pub const NAME: &str = "ram";
/// Version of its encoding.
pub const VERSION: u32 = 4;

const FLAG_ZERO: u64 = 0x02;
const FLAG_MEM_SIZE: u64 = 0x04;
const FLAG_PAGE: u64 = 0x08;
const FLAG_EOS: u64 = 0x10;
const FLAG_CONTINUE: u64 = 0x20;
const FLAG_XBZRLE: u64 = 0x40;
const FLAG_MULTIFD_FLUSH: u64 = 0x200;
const FLAGS: u64 = PAGE_SIZE - 1;

/// One record. `block` is the name of the RAM block where it is written out, and `None` where the record says "the same
/// as in the one before"; `offset` is the position in the block, a multiple of 4096 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Record {
    /// So many bytes of RAM; a list of blocks follows.
    BlockList {
        /// Length of all blocks together.
        total: u64,
    },
    /// A page of zeros.
    Zero {
        /// The block, if it is named.
        block: Option<String>,
        /// Position of the page in it.
        offset: u64,
    },
    /// A page with content.
    Page {
        /// The block, if it is named.
        block: Option<String>,
        /// Position of the page in it.
        offset: u64,
    },
    /// A page as the difference to what was sent before (run lengths, only in precopy).
    Xbzrle {
        /// The block, if it is named.
        block: Option<String>,
        /// Position of the page in it.
        offset: u64,
        /// The encoded difference.
        data: Vec<u8>,
    },
    /// Multifd channels are to be synchronised.
    MultifdFlush,
    /// The end of the section's body.
    Eos,
}

/// Reads records, and remembers the block of the last one: use one for all sections of a channel.
#[derive(Clone, Debug, Default)]
pub struct RecordReader {
    block: Option<String>,
}

impl RecordReader {
    /// A reader at the start of a channel, where the first page must name its block.
    #[must_use]
    pub fn new() -> RecordReader {
        RecordReader::default()
    }

    /// The block of the last record of a page.
    #[must_use]
    pub fn block(&self) -> Option<&str> {
        self.block.as_deref()
    }

    /// Reads a record; the content of a [`Record::Page`] goes to `page`.
    ///
    /// # Errors
    /// If the input fails or ends, or the record is none of the known ones.
    pub fn next<R: Read>(&mut self, input: &mut StreamReader<R>, page: &mut Page) -> Result<Record, StreamError> {
        let at = input.position().0;
        let word = input.read_u64("a RAM record")?;
        let (offset, flags) = (word & !FLAGS, word & FLAGS);
        let record = match flags & !FLAG_CONTINUE {
            FLAG_MEM_SIZE => Record::BlockList { total: offset },
            FLAG_EOS if offset == 0 => Record::Eos,
            FLAG_MULTIFD_FLUSH if offset == 0 => Record::MultifdFlush,
            FLAG_ZERO => {
                let block = self.block_id(input, flags, at)?;
                let fill = input.read_u8("a zero page")?;
                if fill != 0 {
                    return Err(StreamError::invalid(format!("a page filled with {fill:#04x}"), at));
                }
                Record::Zero { block, offset }
            }
            FLAG_PAGE => {
                let block = self.block_id(input, flags, at)?;
                input.read_bytes(page, "the content of a page")?;
                Record::Page { block, offset }
            }
            FLAG_XBZRLE => {
                let block = self.block_id(input, flags, at)?;
                let kind = input.read_u8("an XBZRLE page")?;
                let length = input.read_u16("an XBZRLE page")?;
                if kind != 1 || u64::from(length) > PAGE_SIZE {
                    return Err(StreamError::invalid(format!("an XBZRLE page of {length} bytes, kind {kind}"), at));
                }
                let data = input.read_vec(u32::from(length), "an XBZRLE page")?;
                Record::Xbzrle { block, offset, data }
            }
            _ => return Err(StreamError::invalid(format!("a RAM record with flags {flags:#x}"), at)),
        };
        let of_a_page = flags & (FLAG_ZERO | FLAG_PAGE | FLAG_XBZRLE) != 0;
        if flags & FLAG_CONTINUE != 0 && !of_a_page {
            return Err(StreamError::invalid(format!("a RAM record with flags {flags:#x}"), at));
        }
        Ok(record)
    }

    fn block_id<R: Read>(
        &mut self,
        input: &mut StreamReader<R>,
        flags: u64,
        at: u64,
    ) -> Result<Option<String>, StreamError> {
        if flags & FLAG_CONTINUE != 0 {
            return match self.block {
                Some(_) => Ok(None),
                None => Err(StreamError::invalid("a page of \"the same RAM block\", but none was named", at)),
            };
        }
        let name = input.read_counted("the name of a RAM block")?;
        self.block = Some(name.clone());
        Ok(Some(name))
    }
}

/// Writes records; names a block only where it changes, as QEMU does. Use one for each channel.
#[derive(Clone, Debug, Default)]
pub struct RecordWriter {
    block: Option<String>,
}

impl RecordWriter {
    /// A writer at the start of a channel, or after a recovery.
    #[must_use]
    pub fn new() -> RecordWriter {
        RecordWriter::default()
    }

    /// Writes the content of the page at `offset` (a multiple of 4096) of a block.
    ///
    /// # Errors
    /// If the output fails, or the name is longer than 255 bytes.
    pub fn page(&mut self, out: &mut impl Write, block: &str, offset: u64, page: &Page) -> Result<(), EncodeError> {
        let head = self.head(FLAG_PAGE, block, offset)?;
        out.write_all(&head)?;
        Ok(out.write_all(page)?)
    }

    /// Writes that the page at `offset` of a block is zero.
    ///
    /// # Errors
    /// As [`page`](RecordWriter::page).
    pub fn zero(&mut self, out: &mut impl Write, block: &str, offset: u64) -> Result<(), EncodeError> {
        let mut head = self.head(FLAG_ZERO, block, offset)?;
        head.push(0);
        Ok(out.write_all(&head)?)
    }

    /// Writes the end of a section's body.
    ///
    /// # Errors
    /// If the output fails.
    pub fn end_of_section(&mut self, out: &mut impl Write) -> Result<(), EncodeError> {
        Ok(out.write_all(&FLAG_EOS.to_be_bytes())?)
    }

    /// Writes the start of a list of blocks, `total` bytes together: the entries are to follow.
    ///
    /// # Errors
    /// If the output fails.
    pub fn block_list(&mut self, out: &mut impl Write, total: u64) -> Result<(), EncodeError> {
        Ok(out.write_all(&(total | FLAG_MEM_SIZE).to_be_bytes())?)
    }

    /// Writes a record exactly as it was read, with the content of its page.
    ///
    /// # Errors
    /// As [`page`](RecordWriter::page).
    pub fn record(&mut self, out: &mut impl Write, record: &Record, page: &Page) -> Result<(), EncodeError> {
        if let Record::Zero { block: Some(_), .. }
        | Record::Page { block: Some(_), .. }
        | Record::Xbzrle { block: Some(_), .. } = record
        {
            self.block = None;
        }
        let same = self.block.clone().unwrap_or_default();
        match record {
            Record::BlockList { total } => self.block_list(out, *total),
            Record::Zero { block, offset } => self.zero(out, block.as_ref().unwrap_or(&same), *offset),
            Record::Page { block, offset } => self.page(out, block.as_ref().unwrap_or(&same), *offset, page),
            Record::Xbzrle { block, offset, data } => {
                let mut head = self.head(FLAG_XBZRLE, block.as_ref().unwrap_or(&same), *offset)?;
                let limit = PAGE_SIZE as usize;
                let length = u16::try_from(data.len());
                let length =
                    length.map_err(|_| EncodeError::Length { what: "an XBZRLE page", length: data.len(), limit })?;
                head.push(1);
                head.extend(length.to_be_bytes());
                head.extend(data);
                Ok(out.write_all(&head)?)
            }
            Record::MultifdFlush => Ok(out.write_all(&FLAG_MULTIFD_FLUSH.to_be_bytes())?),
            Record::Eos => self.end_of_section(out),
        }
    }

    fn head(&mut self, flag: u64, block: &str, offset: u64) -> Result<Vec<u8>, EncodeError> {
        let mut head = Vec::with_capacity(16 + block.len());
        let offset = offset & !FLAGS;
        if self.block.as_deref() == Some(block) {
            head.extend((offset | flag | FLAG_CONTINUE).to_be_bytes());
            return Ok(head);
        }
        head.extend((offset | flag).to_be_bytes());
        push_counted(&mut head, block)?;
        self.block = Some(block.to_owned());
        Ok(head)
    }
}

/// An entry of the list of RAM blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// The block's name.
    pub name: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// Its page size: only in streams with postcopy, for a block whose page size is not that of the host.
    pub page_size: Option<u64>,
    /// Its guest-physical address: only in streams with `x-ignore-shared`.
    pub gpa: Option<u64>,
}

/// What is in the entries of a list; the stream itself does not say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockFields {
    /// A page size (postcopy, and this block has huge pages).
    pub page_size: bool,
    /// A guest-physical address (`x-ignore-shared`).
    pub gpa: bool,
}

/// Reads an entry of the list of RAM blocks. The list is complete when the lengths add up to its total.
///
/// # Errors
/// If the input fails or ends.
pub fn read_block<R: Read>(input: &mut StreamReader<R>, fields: BlockFields) -> Result<BlockEntry, StreamError> {
    let name = input.read_counted("the name of a RAM block")?;
    let used_length = input.read_u64("the length of a RAM block")?;
    let page_size = fields.page_size.then(|| input.read_u64("the page size of a RAM block")).transpose()?;
    let gpa = fields.gpa.then(|| input.read_u64("the address of a RAM block")).transpose()?;
    Ok(BlockEntry { name, used_length, page_size, gpa })
}

/// Writes an entry of the list of RAM blocks.
///
/// # Errors
/// If the output fails, or the name is longer than 255 bytes.
pub fn write_block(out: &mut impl Write, entry: &BlockEntry) -> Result<(), EncodeError> {
    let mut bytes = Vec::new();
    push_counted(&mut bytes, &entry.name)?;
    bytes.extend(entry.used_length.to_be_bytes());
    for optional in [entry.page_size, entry.gpa].into_iter().flatten() {
        bytes.extend(optional.to_be_bytes());
    }
    Ok(out.write_all(&bytes)?)
}

#[cfg(test)]
mod tests {
    use page_units::FileOffset;

    use super::*;

    #[test]
    fn records_survive_the_wire() {
        let records = [
            Record::BlockList { total: 8192 },
            Record::Page { block: Some("a".into()), offset: 4096 },
            Record::Zero { block: None, offset: 0 },
            Record::Zero { block: Some("a".into()), offset: 0 },
            Record::Xbzrle { block: Some("b".into()), offset: 0, data: vec![1, 2, 3] },
            Record::Page { block: None, offset: 4096 },
            Record::MultifdFlush,
            Record::Eos,
        ];
        let mut bytes = Vec::new();
        let mut writer = RecordWriter::new();
        for record in &records {
            writer.record(&mut bytes, record, &[7; 4096]).unwrap();
        }
        let mut input = StreamReader::headless(bytes.as_slice(), FileOffset(0));
        let (mut reader, mut page) = (RecordReader::new(), [0; 4096]);
        for record in &records {
            assert_eq!(&reader.next(&mut input, &mut page).unwrap(), record);
        }
        assert_eq!((page, input.position().0), ([7; 4096], bytes.len() as u64));
    }

    #[test]
    fn nonsense_is_refused() {
        let read = |word: u64, tail: &[u8]| {
            let bytes = [&word.to_be_bytes(), tail].concat();
            let mut input = StreamReader::headless(bytes.as_slice(), FileOffset(0));
            RecordReader::new().next(&mut input, &mut [0; 4096])
        };
        assert!(read(FLAG_PAGE | FLAG_CONTINUE, &[0; 4096]).is_err());
        assert!(read(FLAG_ZERO, &[1, b'a', 1]).is_err());
        assert!(read(FLAG_EOS | FLAG_CONTINUE, &[]).is_err());
        assert!(read(0x80, &[]).is_err());
        assert!(read(FLAG_PAGE, &[1, b'a', 0, 0]).is_err());
        assert_eq!(read(FLAG_ZERO, &[1, b'a', 0]).unwrap(), Record::Zero { block: Some("a".into()), offset: 0 });
    }
}
