//! From the list of RAM blocks to the end of the stream.

use std::io::Read;

use page_source::{PageSet, PageSink};
use page_units::{ByteLen, FileOffset, Layout, PageCount, PageIndex, PageRun};
use vmstate::ram::{Record, RecordReader};
use vmstate::{Command, Event, StreamReader};

use super::batch::{Batch, taken};
use super::error::ReadError;
use super::tail;

/// A stream whose list of RAM blocks was read.
#[derive(Debug)]
pub(super) struct Records<R> {
    pub(super) from: StreamReader<R>,
    pub(super) records: RecordReader,
}

impl<R: Read> Records<R> {
    /// Reads the rest and tells the sink of every page. What follows RAM.
    pub(super) fn run(mut self, layout: &Layout, sink: &dyn PageSink) -> Result<Vec<u8>, ReadError> {
        let mut seen = PageSet::new(layout);
        let mut batch = Batch::new(sink);
        let first = loop {
            self.section(layout, &mut seen, &mut batch)?;
            batch.tell()?;
            if let Some(first) = self.between()? {
                break first;
            }
        };
        let device_state = tail::read(&mut self.from, first)?;
        tail::check(&device_state.value, device_state.range.start)?;
        // What QEMU does not send its own destinations find zero: memory that is not plugged in (virtio-mem).
        for all in layout.runs() {
            let mut rest = all;
            while !rest.is_empty() {
                let gap = seen.first_gap(rest);
                if gap.is_empty() {
                    break;
                }
                taken(sink, sink.zero(gap))?;
                rest = PageRun::new(all.block, gap.end(), PageCount(all.pages.0.saturating_sub(gap.end().0)));
            }
        }
        Ok(device_state.value)
    }

    /// The records of one section, up to its end.
    fn section(&mut self, layout: &Layout, seen: &mut PageSet, batch: &mut Batch<'_>) -> Result<(), ReadError> {
        // The block of the record before, which is usually that of the next.
        let mut current = None;
        loop {
            let at = self.from.position();
            let (offset, named, zero) = match self.records.next(&mut self.from)? {
                Record::EndOfSection => return Ok(()),
                Record::Page { offset, named } => (offset, named, false),
                Record::Zero { offset, named } => (offset, named, true),
                other => return Err(ReadError::Foreign { at, what: unknown(other).to_owned() }),
            };
            let name = self.records.block().unwrap_or_default();
            let block = match current {
                Some(block) if !named => block,
                _ => layout.find(name).map(|(block, _)| block).ok_or_else(|| no_such_page(at, name, offset))?,
            };
            current = Some(block);
            let page = PageRun::single(block, PageIndex::at_byte(offset));
            if !layout.contains(page) {
                return Err(no_such_page(at, name, offset));
            }
            if seen.insert(page).0 == 0 {
                return Err(ReadError::PageTwice { at, block: name.to_owned(), page: offset });
            }
            if zero {
                batch.zero(block, page.first)?;
            } else {
                batch.page(block, page.first, &mut self.from)?;
            }
        }
    }

    /// From the end of a section's records to those of the next section, or to the first section of a device.
    fn between(&mut self) -> Result<Option<tail::First>, ReadError> {
        loop {
            let Some(event) = self.from.next_event()? else {
                return Err(ReadError::NoDescription { at: self.from.position() });
            };
            let at = event.range.start;
            let what = match event.value {
                Event::Footer { .. } => continue,
                // Of no use in a file, and unknown to older QEMUs.
                Event::Command(command) if matches!(command.decode(at), Ok(Command::SwitchoverStart)) => continue,
                // Only RAM has started.
                Event::SectionPart { .. } | Event::SectionEnd { .. } => return Ok(None),
                Event::SectionFull(header) => return Ok(Some(tail::First { header, range: event.range })),
                Event::SectionStart(header) => format!("\"{}\" is saved in several sections", header.name),
                Event::Command(command) => format!("the command {}", command.name()),
                Event::Eof => "the end mark, without any device state".to_owned(),
                _ => "something that does not follow RAM".to_owned(),
            };
            return Err(ReadError::Foreign { at, what });
        }
    }
}

fn unknown(record: Record) -> &'static str {
    match record {
        Record::MemSize { .. } => "a second list of RAM blocks",
        Record::Xbzrle { .. } => "an XBZRLE page: the capability xbzrle was on",
        Record::MultifdFlush => "a record of multifd",
        _ => "an unknown RAM record",
    }
}

fn no_such_page(at: FileOffset, block: &str, page: ByteLen) -> ReadError {
    ReadError::NoSuchPage { at, block: block.to_owned(), page }
}
