//! Reading a stream.

mod body;

use std::collections::HashMap;
use std::io::{Read, Seek, SeekFrom};

use page_units::{ByteLen, FileOffset};

use crate::wire::Wire;
use crate::{Configuration, Event, Located, MAGIC, RawCommand, SectionHeader, StreamError, VERSION, kind};

/// The longest description of device state that is read: QEMU's are a few hundred KiB.
pub const MAX_VMDESC: ByteLen = ByteLen(16 << 20);
/// More devices than any guest has.
const MAX_SECTIONS: usize = 65536;

/// Reads a migration stream, part by part, from a file or a socket.
///
/// [`next_event`](StreamReader::next_event) gives the parts. After the header of a section the consumer reads the
/// section's body with the methods of this type (nothing in the stream tells its length), and the next event is then
/// the footer, which must be that section's. Reads are small: wrap a socket or a file into a
/// [`BufReader`](std::io::BufReader).
#[derive(Debug)]
pub struct StreamReader<R> {
    wire: Wire<R>,
    state: State,
    nested: bool,
    started: HashMap<u32, String>,
}

#[derive(Debug)]
enum State {
    Beginning,
    Parts,
    Body { id: u32, name: String },
    AfterEof,
    Done,
}

impl<R: Read> StreamReader<R> {
    /// A reader of a stream whose first byte is at `at` of the file.
    pub fn new(inner: R, at: FileOffset) -> StreamReader<R> {
        StreamReader { wire: Wire::new(inner, at), state: State::Beginning, nested: false, started: HashMap::new() }
    }

    /// A reader of a stream without header: inside PACKAGED, or after a recovery. It may end without EOF, and may
    /// continue sections that began elsewhere.
    pub fn nested(inner: R, at: FileOffset) -> StreamReader<R> {
        StreamReader { wire: Wire::new(inner, at), state: State::Parts, nested: true, started: HashMap::new() }
    }

    /// The next part, or `None` after the last.
    ///
    /// # Errors
    /// If the stream is not well-formed here, or can't be read.
    pub fn next_event(&mut self) -> Result<Option<Located<Event>>, StreamError> {
        let start = self.position();
        let value = match self.state {
            State::Beginning => Some(self.header()?),
            State::Parts => self.part()?,
            State::Body { .. } => Some(self.footer()?),
            State::AfterEof => self.description()?,
            State::Done => None,
        };
        Ok(value.map(|value| Located { value, range: start..self.position() }))
    }

    fn header(&mut self) -> Result<Event, StreamError> {
        let at = self.position();
        match self.wire.u32("the header") {
            Ok(MAGIC) => {}
            Ok(_) | Err(StreamError::Truncated { .. }) => return Err(StreamError::NoMagic { at }),
            Err(error) => return Err(error),
        }
        let at = self.position();
        let version = self.wire.u32("the header")?;
        if version != VERSION {
            return Err(StreamError::Version { at, version });
        }
        self.state = State::Parts;
        Ok(Event::Header)
    }

    fn part(&mut self) -> Result<Option<Event>, StreamError> {
        let at = self.position();
        if self.wire.peek()?.is_none() {
            if self.nested {
                self.state = State::Done;
                return Ok(None);
            }
            return Err(StreamError::Truncated { at, what: "the stream: neither a section nor its end follows" });
        }
        let event = match self.wire.u8("a section")? {
            kind::EOF => {
                self.state = State::AfterEof;
                Event::Eof
            }
            kind::CONFIGURATION => Event::Configuration(Configuration::read(&mut self.wire)?),
            kind::COMMAND => {
                let number = self.wire.u16("a command")?;
                let length = self.wire.u16("a command")?;
                Event::Command(RawCommand { number, payload: self.wire.vec(length.into(), 65535, "a command")? })
            }
            kind::START => {
                let header = self.section_header()?;
                self.started.entry(header.id).or_insert_with(|| header.name.clone());
                Event::SectionStart(header)
            }
            kind::FULL => Event::SectionFull(self.section_header()?),
            kind::PART => Event::SectionPart { id: self.known_section(at)? },
            kind::END => Event::SectionEnd { id: self.known_section(at)? },
            other => return Err(StreamError::Invalid { at, what: format!("unknown section type {other:#04x}") }),
        };
        Ok(Some(event))
    }

    fn section_header(&mut self) -> Result<SectionHeader, StreamError> {
        const WHAT: &str = "the header of a section";
        let header = SectionHeader {
            id: self.wire.u32(WHAT)?,
            name: self.wire.counted_string("the name of a section")?,
            instance: self.wire.u32(WHAT)?,
            version: self.wire.u32(WHAT)?,
        };
        if self.started.len() >= MAX_SECTIONS {
            return Err(self.wire.invalid(format!("more than {MAX_SECTIONS} sections")));
        }
        self.state = State::Body { id: header.id, name: header.name.clone() };
        Ok(header)
    }

    fn known_section(&mut self, at: FileOffset) -> Result<u32, StreamError> {
        let id = self.wire.u32("the header of a section")?;
        let name = match self.section_name(id) {
            Some(name) => name.to_owned(),
            None if self.nested => String::new(),
            None => {
                return Err(StreamError::Invalid { at, what: format!("section {id} goes on without having started") });
            }
        };
        self.state = State::Body { id, name };
        Ok(id)
    }

    fn footer(&mut self) -> Result<Event, StreamError> {
        let at = self.position();
        let State::Body { id, name } = std::mem::replace(&mut self.state, State::Parts) else {
            return Err(self.wire.invalid("no section to end"));
        };
        let byte = self.wire.u8("the footer of a section")?;
        if byte != kind::FOOTER {
            return Err(StreamError::Footer { at, id, name, found: format!("byte {byte:#04x}") });
        }
        let found = self.wire.u32("the footer of a section")?;
        if found != id {
            return Err(StreamError::Footer { at, id, name, found: format!("the footer of section {found}") });
        }
        Ok(Event::Footer { id })
    }

    fn description(&mut self) -> Result<Option<Event>, StreamError> {
        let at = self.position();
        self.state = State::Done;
        match self.wire.peek()? {
            None => return Ok(None),
            Some(kind::VMDESCRIPTION) => {}
            Some(other) => {
                return Err(StreamError::Invalid {
                    at,
                    what: format!("byte {other:#04x} after the end of the sections"),
                });
            }
        }
        const WHAT: &str = "the description of the device state";
        self.wire.u8(WHAT)?;
        let length = self.wire.u32(WHAT)?;
        Ok(Some(Event::VmDesc(self.wire.vec(length.into(), MAX_VMDESC.0, WHAT)?)))
    }

    /// The name under which a section of that number started.
    #[must_use]
    pub fn section_name(&self, id: u32) -> Option<&str> {
        self.started.get(&id).map(String::as_str)
    }

    /// Where the next byte comes from.
    #[must_use]
    pub fn position(&self) -> FileOffset {
        self.wire.position()
    }

    /// What it reads from. At most one byte that it has read was not given out yet: the one after a configuration
    /// or a nested part.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.wire.inner
    }

    /// What it read from.
    pub fn into_inner(self) -> R {
        self.wire.inner
    }
}

impl<R: Read + Seek> StreamReader<R> {
    /// Goes on at another place of the file, still in the body of the same section.
    ///
    /// # Errors
    /// If the file can't be positioned.
    pub fn seek_to(&mut self, to: FileOffset) -> Result<(), StreamError> {
        let at = self.position();
        // Relative, so that it is right whatever the reader's own idea of its start is, and keeps its buffer.
        let ahead = i64::from(self.wire.is_peeked());
        let delta = i128::from(to.0) - i128::from(at.0) - i128::from(ahead);
        let Ok(delta) = i64::try_from(delta) else {
            return Err(StreamError::Invalid { at, what: format!("a jump to offset {to}") });
        };
        self.wire.inner.seek(SeekFrom::Current(delta)).map_err(|error| StreamError::Io { at, error })?;
        self.wire.forget_peeked();
        self.wire.at = to.0;
        Ok(())
    }
}
