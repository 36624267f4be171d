//! From the bytes of a file to what is in it.

mod ram_section;

use std::io::BufReader;

use page_units::FileOffset;
use vmstate::ram;
use vmstate::{
    Configuration, Event, SectionEntry, SectionHeader, SectionKind, StreamError, StreamReader, VmDesc, find_vmdesc,
};

use crate::blocks::Block;
use crate::bytes::Bytes;
use crate::cursor::Cursor;
use crate::{OpenErrorKind, Warning};

/// More sections than any file has: each round of a live save adds one.
const MAX_SECTIONS: usize = 1 << 20;

/// What the metadata of a file says.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) configuration: Configuration,
    pub(crate) blocks: Vec<Block>,
    pub(crate) sections: Vec<SectionEntry>,
    pub(crate) devices: std::ops::Range<FileOffset>,
    pub(crate) end: FileOffset,
    pub(crate) vmdesc: Option<VmDesc>,
    pub(crate) complete: bool,
    pub(crate) ram_ended: bool,
    pub(crate) warnings: Vec<Warning>,
}

/// Reads the metadata of the stream that begins at `base` of a file, which ends at `size`.
///
/// # Errors
/// If it is not a whole mapped-ram stream; with `damaged`, only if not even its list of RAM blocks begins.
pub(crate) fn parse(file: &Bytes, base: FileOffset, size: FileOffset, damaged: bool) -> Result<Parsed, OpenErrorKind> {
    let mut parser = Parser::new(file, base, size, damaged)?;
    if let Err(error) = parser.run() {
        parser.give_up(error)?;
    }
    parser.finish()
}

#[derive(Debug)]
struct Parser<'a> {
    reader: StreamReader<BufReader<Cursor<'a>>>,
    size: FileOffset,
    damaged: bool,
    has_ram: bool,
    described_at: Option<FileOffset>,
    /// Where the sections after RAM begin, and the end mark is.
    devices_start: Option<FileOffset>,
    eof: Option<FileOffset>,
    parsed: Parsed,
}

impl<'a> Parser<'a> {
    fn new(file: &'a Bytes, base: FileOffset, size: FileOffset, damaged: bool) -> Result<Parser<'a>, OpenErrorKind> {
        let cursor = Cursor::new(file, base.0..size.0)?;
        let mut parsed = Parsed {
            configuration: Configuration::default(),
            blocks: Vec::new(),
            sections: Vec::new(),
            devices: size..size,
            end: size,
            vmdesc: None,
            complete: false,
            ram_ended: false,
            warnings: Vec::new(),
        };
        let text = find_vmdesc(&mut cursor.clone(), base..size)?;
        if let Some(text) = &text {
            match VmDesc::parse(&text.value) {
                Ok(vmdesc) => parsed.vmdesc = Some(vmdesc),
                Err(error) => {
                    let at = FileOffset(text.range.end.0.saturating_sub(text.value.len() as u64));
                    let error = OpenErrorKind::Description { at, error };
                    if !damaged {
                        return Err(error);
                    }
                    parsed.warnings.push(Warning::Incomplete { what: error.to_string() });
                }
            }
            parsed.end = text.range.end;
        }
        let described_at = text.map(|text| text.range.start);
        let reader = StreamReader::new(BufReader::with_capacity(4 << 10, cursor), base);
        Ok(Parser { reader, size, damaged, has_ram: false, described_at, devices_start: None, eof: None, parsed })
    }

    /// Reads the stream from its header to its end.
    fn run(&mut self) -> Result<(), OpenErrorKind> {
        while self.eof.is_none() {
            let Some(event) = self.reader.next_event()? else { break };
            let at = event.range.start;
            match event.value {
                Event::Configuration(configuration) => {
                    check_kind(&configuration)?;
                    self.parsed.configuration = configuration;
                }
                Event::SectionStart(header) => {
                    if header.name != ram::SECTION || self.has_ram {
                        return Err(OpenErrorKind::UnknownSection { at, name: header.name });
                    }
                    self.has_ram = true;
                    self.open_section(SectionKind::Start, at, header)?;
                    self.block_list()?;
                    self.ram_records()?;
                    self.close_section()?;
                }
                Event::SectionPart { id } => self.more_ram(SectionKind::Part, at, id)?,
                Event::SectionEnd { id } => {
                    self.more_ram(SectionKind::End, at, id)?;
                    self.parsed.ram_ended = true;
                }
                Event::SectionFull(header) => {
                    let described = self.full_section(at, header)?;
                    if !described {
                        return self.undescribed();
                    }
                }
                Event::Command(command) => {
                    let header =
                        SectionHeader { id: command.number.into(), name: String::new(), instance: 0, version: 0 };
                    self.open_section(SectionKind::Command, at, header)?;
                }
                Event::Eof => self.eof = Some(at),
                _ => {}
            }
        }
        let Some(eof) = self.eof else { return Err(OpenErrorKind::NoRam) };
        match self.described_at {
            None => self.parsed.end = self.reader.position(),
            Some(described_at) if described_at == self.reader.position() => {}
            Some(described_at) => {
                let what = format!("the stream ends here, but its description is at {described_at}");
                return Err(StreamError::Invalid { at: eof, what }.into());
            }
        }
        self.complete(eof)
    }

    fn complete(&mut self, eof: FileOffset) -> Result<(), OpenErrorKind> {
        if !self.has_ram {
            return Err(OpenErrorKind::NoRam);
        }
        if self.described_at.is_none() {
            self.parsed.warnings.push(Warning::NoDescription);
        }
        let end = self.parsed.end;
        if end < self.size {
            self.parsed.warnings.push(Warning::TrailingBytes { at: end, length: self.size - end });
        }
        self.parsed.devices = self.devices_start.unwrap_or(eof)..eof;
        self.parsed.complete = true;
        Ok(())
    }

    /// A device's section; `false` if nothing tells how long it is.
    fn full_section(&mut self, at: FileOffset, header: SectionHeader) -> Result<bool, OpenErrorKind> {
        if self.has_ram {
            self.devices_start.get_or_insert(at);
        }
        let Some(vmdesc) = &self.parsed.vmdesc else {
            return if self.has_ram && self.described_at.is_none() {
                Ok(false)
            } else {
                Err(OpenErrorKind::UnknownSection { at, name: header.name })
            };
        };
        let length = vmdesc.device(&header.name, header.instance).and_then(|device| device.body_len());
        let end = length.and_then(|length| self.reader.position().checked_add(length));
        let Some(end) = end else {
            return Err(OpenErrorKind::UnknownSection { at, name: header.name });
        };
        if end > self.size {
            return Err(StreamError::Truncated { at: self.size, what: "the body of a section" }.into());
        }
        self.open_section(SectionKind::Full, at, header)?;
        self.reader.seek_to(end)?;
        self.close_section()?;
        Ok(true)
    }

    /// Device state without a description: nothing tells whether it is complete. For a look at a damaged file it goes to
    /// the end of the file, if that may be the end mark: a zero byte, of which device state has many.
    fn undescribed(&mut self) -> Result<(), OpenErrorKind> {
        if !self.damaged {
            return Err(OpenErrorKind::NoDescription { size: self.size });
        }
        let last = FileOffset(self.size.0.saturating_sub(1));
        if last < self.reader.position() {
            return Err(StreamError::Truncated { at: self.size, what: "the state of the devices" }.into());
        }
        self.reader.seek_to(last)?;
        if self.reader.u8()? != vmstate::kind::EOF {
            return Err(StreamError::Truncated { at: self.size, what: "the state of the devices" }.into());
        }
        self.eof = Some(last);
        self.parsed.end = self.size;
        self.complete(last)?;
        self.parsed.complete = false;
        Ok(())
    }

    fn open_section(&mut self, kind: SectionKind, at: FileOffset, header: SectionHeader) -> Result<(), OpenErrorKind> {
        if self.parsed.sections.len() >= MAX_SECTIONS {
            return Err(StreamError::Invalid { at, what: format!("more than {MAX_SECTIONS} sections") }.into());
        }
        let body = self.reader.position();
        let SectionHeader { id, name, instance, version } = header;
        self.parsed.sections.push(SectionEntry {
            kind,
            id,
            name,
            instance,
            version,
            range: at..body,
            body: body..body,
        });
        Ok(())
    }

    /// After the body: reads the footer.
    fn close_section(&mut self) -> Result<(), OpenErrorKind> {
        let body_end = self.reader.position();
        let closed = self.reader.next_event().map(drop);
        match &closed {
            Ok(()) => {
                if let Some(entry) = self.parsed.sections.last_mut() {
                    entry.body.end = body_end;
                    entry.range.end = self.reader.position();
                }
            }
            // A section that is not whole is none.
            Err(_) => drop(self.parsed.sections.pop()),
        }
        Ok(closed?)
    }

    /// After an error: whether what was read is enough for a look at a damaged file.
    fn give_up(&mut self, error: OpenErrorKind) -> Result<(), OpenErrorKind> {
        if !self.damaged || self.parsed.blocks.is_empty() || matches!(error, OpenErrorKind::PlainStream { .. }) {
            return Err(error);
        }
        self.parsed.devices = self.size..self.size;
        self.parsed.end = self.size;
        self.parsed.sections.retain(|entry| entry.kind != SectionKind::Start || entry.body.end > entry.body.start);
        self.parsed.warnings.push(match error {
            OpenErrorKind::Truncated { block, needed, actual } => Warning::TruncatedPages { block, needed, actual },
            error => Warning::Incomplete { what: error.to_string() },
        });
        Ok(())
    }

    fn finish(self) -> Result<Parsed, OpenErrorKind> {
        if self.parsed.blocks.is_empty() {
            return Err(OpenErrorKind::NoRam);
        }
        Ok(self.parsed)
    }
}

/// Refuses a stream whose configuration does not say that it is of this kind.
fn check_kind(configuration: &Configuration) -> Result<(), OpenErrorKind> {
    if configuration.has_capability(vmstate::MAPPED_RAM) {
        return Ok(());
    }
    Err(OpenErrorKind::PlainStream { machine: configuration.machine.clone() })
}
