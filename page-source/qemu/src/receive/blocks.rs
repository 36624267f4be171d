//! The beginning of a stream: what machine, and which RAM blocks.

use std::io::Read;

use page_units::{ByteLen, Layout, PageSize, RamBlock};
use vmstate::ram::{self, Record, RecordReader};
use vmstate::{Configuration, Event, StreamReader};

use super::error::ReadError;

/// More blocks than any guest has.
const MAX_BLOCKS: usize = 4096;

/// Reads up to the end of the list of RAM blocks, inside the RAM section.
pub(super) fn read<R: Read>(
    from: &mut StreamReader<R>,
    records: &mut RecordReader,
    limit: ByteLen,
) -> Result<(Configuration, Layout), ReadError> {
    let mut configuration = Configuration::default();
    loop {
        let Some(event) = from.next_event()? else {
            return Err(foreign(from, "the stream ends without RAM"));
        };
        let at = event.range.start;
        let what = match event.value {
            Event::Header => continue,
            Event::Configuration(found) => {
                // Both capabilities that a stream can list change how RAM is sent.
                if let Some(name) = found.capabilities().next() {
                    return Err(ReadError::Foreign { at, what: format!("it was sent with the capability {name}") });
                }
                configuration = found;
                continue;
            }
            Event::SectionStart(header) if header.name == ram::SECTION => break,
            Event::SectionStart(header) | Event::SectionFull(header) => {
                format!("device \"{}\" begins its state before RAM, and nothing tells where that ends", header.name)
            }
            Event::Command(command) => format!("the command {} before RAM", command.name()),
            Event::Eof => "the end mark, before any RAM".to_owned(),
            _ => "something else than RAM".to_owned(),
        };
        return Err(ReadError::Foreign { at, what });
    }
    let layout = list(from, records, limit)?;
    Ok((configuration, layout))
}

fn list<R: Read>(from: &mut StreamReader<R>, records: &mut RecordReader, limit: ByteLen) -> Result<Layout, ReadError> {
    let at = from.position();
    let Record::MemSize { total } = records.next(from)? else {
        return Err(ReadError::Foreign { at, what: "the RAM section does not begin with its list of blocks".into() });
    };
    if total > limit {
        return Err(ReadError::TooMuchRam { at, total, limit });
    }
    let mut blocks = Vec::new();
    let mut left = total;
    while left.0 > 0 {
        let at = from.position();
        let (name, length) = (from.counted_string()?, ByteLen(from.u64()?));
        // Without a limit to empty blocks the list might never end.
        if length.0 == 0 || length > left || blocks.len() >= MAX_BLOCKS {
            let what = format!("RAM block \"{name}\" of {length} bytes, where {left} of {total} are left to list");
            return Err(ReadError::Foreign { at, what });
        }
        left = left - length;
        let block = RamBlock::new(name, length, PageSize::SMALL);
        blocks.push(block.map_err(|error| ReadError::Layout { at: from.position(), error })?);
    }
    Layout::new(blocks).map_err(|error| ReadError::Layout { at: from.position(), error })
}

fn foreign<R: Read>(from: &StreamReader<R>, what: &str) -> ReadError {
    ReadError::Foreign { at: from.position(), what: what.to_owned() }
}
