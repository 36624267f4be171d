//! The RAM section: its list of blocks, and the little that is left of its records.

use page_units::{ByteLen, FileOffset};
use vmstate::ram::{self, Record, RecordReader};
use vmstate::{IGNORE_SHARED, SectionHeader, SectionKind, StreamError};

use super::Parser;
use crate::blocks::{self, Format};
use crate::{OpenErrorKind, Warning};

/// More blocks than any guest has.
const MAX_BLOCKS: usize = 4096;

impl Parser<'_> {
    /// The list of RAM blocks.
    pub(super) fn block_list(&mut self) -> Result<(), OpenErrorKind> {
        let at = self.reader.position();
        let Record::MemSize { total } = RecordReader::new().next(&mut self.reader)? else {
            let what = "the RAM section does not begin with its list of blocks".to_owned();
            return Err(StreamError::Invalid { at, what }.into());
        };
        blocks::check_total(at, total)?;
        let addresses = self.parsed.configuration.has_capability(IGNORE_SHARED);
        let format = Format { addresses, size: self.size };
        let mut left = total;
        while left.0 > 0 {
            let record = self.reader.position();
            let block = match format.read(&mut self.reader)? {
                Some(block) if block.ram.length() <= left => block,
                longer => {
                    let more = longer.map(|block| block.ram.length()).unwrap_or_default();
                    let sum = ByteLen((total - left).0.saturating_add(more.0));
                    if !self.damaged {
                        return Err(OpenErrorKind::RamLength { at: record, total, sum });
                    }
                    self.parsed.warnings.push(Warning::RamLengthDisagrees { at: record, total, sum });
                    self.reader.seek_to(record)?;
                    break;
                }
            };
            left = left - block.ram.length();
            let (end, in_file) = (block.pages_end(), block.file.in_file);
            if self.parsed.blocks.iter().any(|other| other.ram.name() == block.ram.name()) {
                let what = "a second block of that name".to_owned();
                return Err(OpenErrorKind::Block {
                    block: block.ram.name().into(),
                    at: block.file.header_offset,
                    what,
                });
            }
            if self.parsed.blocks.len() >= MAX_BLOCKS {
                let what = format!("more than {MAX_BLOCKS} RAM blocks");
                return Err(StreamError::Invalid { at: block.file.header_offset, what }.into());
            }
            let name = block.ram.name().to_owned();
            self.parsed.blocks.push(block);
            if in_file && end > self.size {
                return Err(OpenErrorKind::Truncated { block: name, needed: end, actual: self.size });
            }
            if in_file {
                self.reader.seek_to(end)?;
            }
        }
        if let Some((one, other, at)) = blocks::overlap(&self.parsed.blocks) {
            let (block, other) = (one.ram.name().to_owned(), other.ram.name().to_owned());
            if !self.damaged {
                let what = format!("its area overlaps with one of RAM block \"{other}\" at offset {at}");
                return Err(OpenErrorKind::Block { block, at: one.file.header_offset, what });
            }
            self.parsed.warnings.push(Warning::Overlap { block, other, at });
        }
        Ok(())
    }

    /// The records of a RAM section: pages are elsewhere, so there is nothing but the end.
    pub(super) fn ram_records(&mut self) -> Result<(), OpenErrorKind> {
        let at = self.reader.position();
        match RecordReader::new().next(&mut self.reader)? {
            Record::EndOfSection => Ok(()),
            _ => {
                let what = "a page record in the stream of a mapped-ram file".to_owned();
                Err(StreamError::Invalid { at, what }.into())
            }
        }
    }

    pub(super) fn more_ram(&mut self, kind: SectionKind, at: FileOffset, id: u32) -> Result<(), OpenErrorKind> {
        let header = SectionHeader { id, name: ram::SECTION.to_owned(), instance: 0, version: 0 };
        self.open_section(kind, at, header)?;
        self.ram_records()?;
        self.close_section()?;
        // Devices are what follows the last of RAM.
        self.devices_start = None;
        Ok(())
    }
}
