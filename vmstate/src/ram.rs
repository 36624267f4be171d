//! The records inside a `ram` section (QEMU `migration/ram.c`, `RAM_SAVE_FLAG_*`), read and written one by one.
//!
//! What the blocks look like in the file is not known here: after [`Record::MemSize`] the consumer reads the list of
//! blocks, and after [`Record::Page`] the 4096 bytes of the page, from the same
//! [`StreamReader`].

use std::io::{Read, Write};

use page_units::{ByteLen, PAGE_SIZE};

use crate::{StreamError, StreamReader, StreamWriter, WriteError};

/// The name of the section.
pub const SECTION: &str = "ram";
/// The version of the section.
pub const SECTION_VERSION: u32 = 4;

/// What is ORed into the offset of a page.
pub mod flag {
    /// The page is filled with one byte, zero.
    pub const ZERO: u64 = 0x02;
    /// The length of all blocks, then their list.
    pub const MEM_SIZE: u64 = 0x04;
    /// The page's content follows.
    pub const PAGE: u64 = 0x08;
    /// The end of this section's records.
    pub const EOS: u64 = 0x10;
    /// The page belongs to the block of the record before.
    pub const CONTINUE: u64 = 0x20;
    /// The page's difference to what the destination has follows.
    pub const XBZRLE: u64 = 0x40;
    /// All multifd channels are to be waited for.
    pub const MULTIFD_FLUSH: u64 = 0x200;
}

/// One record of a `ram` section. `named` tells whether the record carries the block's name or continues the block of
/// the record before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Record {
    /// The length of all blocks; the list of blocks follows and is read by the consumer.
    MemSize {
        /// The sum of the lengths.
        total: ByteLen,
    },
    /// A page of zeros.
    Zero {
        /// Where in the block.
        offset: ByteLen,
        /// With the block's name.
        named: bool,
    },
    /// A page; its 4096 bytes follow and are read by the consumer.
    Page {
        /// Where in the block.
        offset: ByteLen,
        /// With the block's name.
        named: bool,
    },
    /// The difference of a page; `length` bytes follow and are read by the consumer.
    Xbzrle {
        /// Where in the block.
        offset: ByteLen,
        /// With the block's name.
        named: bool,
        /// How many bytes.
        length: u16,
    },
    /// All multifd channels are to be waited for.
    MultifdFlush,
    /// The section's footer follows.
    EndOfSection,
}

/// Reads records, and remembers the block they are about: from section to section, as the stream does.
#[derive(Clone, Debug, Default)]
pub struct RecordReader {
    block: Option<String>,
}

impl RecordReader {
    /// A reader at the beginning of a stream (or of a further channel).
    #[must_use]
    pub fn new() -> RecordReader {
        RecordReader::default()
    }

    /// The block that the record just read is about.
    #[must_use]
    pub fn block(&self) -> Option<&str> {
        self.block.as_deref()
    }

    /// The next record.
    ///
    /// # Errors
    /// If it is none that QEMU writes, or can't be read.
    pub fn next<R: Read>(&mut self, from: &mut StreamReader<R>) -> Result<Record, StreamError> {
        let at = from.position();
        let invalid = |what: String| StreamError::Invalid { at, what };
        let word = from.u64()?;
        let (offset, flags) = (ByteLen(word & !(PAGE_SIZE - 1)), word & (PAGE_SIZE - 1));
        match flags {
            flag::EOS if offset.0 == 0 => return Ok(Record::EndOfSection),
            flag::MULTIFD_FLUSH if offset.0 == 0 => return Ok(Record::MultifdFlush),
            flag::MEM_SIZE => return Ok(Record::MemSize { total: offset }),
            _ => {}
        }
        let named = flags & flag::CONTINUE == 0;
        let kind = flags & !flag::CONTINUE;
        if !matches!(kind, flag::ZERO | flag::PAGE | flag::XBZRLE) {
            return Err(invalid(format!("unknown RAM record {word:#x}")));
        }
        if named {
            let name = from.counted_string()?;
            // A name that repeats is the usual case: no new memory then.
            if self.block.as_deref() != Some(name.as_str()) {
                self.block = Some(name);
            }
        } else if self.block.is_none() {
            return Err(invalid("a RAM record continues a block, but none was named".to_owned()));
        }
        match kind {
            flag::ZERO => match from.u8()? {
                0 => Ok(Record::Zero { offset, named }),
                fill => Err(invalid(format!("a page filled with {fill:#04x}"))),
            },
            flag::PAGE => Ok(Record::Page { offset, named }),
            _ => match from.u8()? {
                1 => Ok(Record::Xbzrle { offset, named, length: from.u16()? }),
                other => Err(invalid(format!("an XBZRLE page with encoding {other}"))),
            },
        }
    }
}

/// Writes records, and remembers which block the last one was about.
#[derive(Clone, Debug, Default)]
pub struct RecordWriter {
    block: Option<String>,
}

impl RecordWriter {
    /// A writer at the beginning of a stream (or of a further channel, or after a recovery).
    #[must_use]
    pub fn new() -> RecordWriter {
        RecordWriter::default()
    }

    /// Writes the record of a page without its content, which has to follow: 4096 bytes.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn page<W: Write>(&mut self, to: &mut StreamWriter<W>, block: &str, at: ByteLen) -> Result<(), WriteError> {
        self.record(to, block, at, flag::PAGE)
    }

    /// Writes the record of a page of zeros.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn zero<W: Write>(&mut self, to: &mut StreamWriter<W>, block: &str, at: ByteLen) -> Result<(), WriteError> {
        self.record(to, block, at, flag::ZERO)?;
        to.bytes(&[0])
    }

    /// Writes the length of all blocks; their list has to follow.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn mem_size<W: Write>(&mut self, to: &mut StreamWriter<W>, total: ByteLen) -> Result<(), WriteError> {
        to.u64(total.0 | flag::MEM_SIZE)
    }

    /// Ends the records of this section; its footer has to follow.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn end<W: Write>(&mut self, to: &mut StreamWriter<W>) -> Result<(), WriteError> {
        to.u64(flag::EOS)
    }

    /// Writes a record as it was read, for the block named `block`. What follows the record has to follow.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn copy<W: Write>(&mut self, to: &mut StreamWriter<W>, record: Record, block: &str) -> Result<(), WriteError> {
        match record {
            Record::MemSize { total } => self.mem_size(to, total),
            Record::EndOfSection => self.end(to),
            Record::MultifdFlush => to.u64(flag::MULTIFD_FLUSH),
            Record::Page { offset, named } => self.head(to, block, offset, flag::PAGE, named),
            Record::Zero { offset, named } => {
                self.head(to, block, offset, flag::ZERO, named)?;
                to.bytes(&[0])
            }
            Record::Xbzrle { offset, named, length } => {
                self.head(to, block, offset, flag::XBZRLE, named)?;
                to.bytes(&[1])?;
                to.bytes(&length.to_be_bytes())
            }
        }
    }

    fn record<W: Write>(
        &mut self,
        to: &mut StreamWriter<W>,
        block: &str,
        at: ByteLen,
        flags: u64,
    ) -> Result<(), WriteError> {
        let named = self.block.as_deref() != Some(block);
        self.head(to, block, at, flags, named)
    }

    fn head<W: Write>(
        &mut self,
        to: &mut StreamWriter<W>,
        block: &str,
        at: ByteLen,
        flags: u64,
        named: bool,
    ) -> Result<(), WriteError> {
        if !named {
            return to.u64(at.0 | flags | flag::CONTINUE);
        }
        to.u64(at.0 | flags)?;
        to.counted_string(block)?;
        self.block = Some(block.to_owned());
        Ok(())
    }
}
