//! Reads a stream, from a file or a socket.

use std::collections::BTreeMap;
use std::io::{self, Read};

use page_units::FileOffset;

use crate::event::{MAGIC, VERSION, byte};
use crate::{
    Configuration, ConfigurationPart, Event, Located, RawCommand, SectionHeader, SectionKind, SectionName, StreamError,
};

/// The longest description that is read. Real ones have 45 KB to a few hundred KB.
const MAX_VMDESC: u32 = 64 << 20;
/// Longest name of a machine type; QEMU's own are below 40 bytes.
const MAX_MACHINE: u32 = 4096;
/// Most capabilities; QEMU has about 20.
const MAX_CAPABILITIES: u32 = 256;

/// Reads a stream piece by piece.
///
/// [`next_event`](StreamReader::next_event) gives what the framing says. Sections have no length, so the *body* of a
/// section is the caller's to read, through the reader itself (it is [`Read`], and has methods for the encodings of the
/// format), between the event of its header and the next call, which expects the footer. The same goes for the body of
/// a package. For the RAM section there is [`ram::RecordReader`](crate::ram::RecordReader); for the length of a device
/// section, [`DeviceDesc::wire_len`](crate::DeviceDesc::wire_len).
///
/// It makes small reads: give it a [`BufReader`](std::io::BufReader), unless the input is memory.
#[derive(Debug)]
pub struct StreamReader<R> {
    input: R,
    at: u64,
    held: Option<u8>,
    state: State,
    footer_due: Option<u32>,
    names: BTreeMap<u32, SectionName>,
    needs_eof: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Header,
    Sections,
    AfterEof,
    Done,
}

impl<R: Read> StreamReader<R> {
    /// Reads a whole stream, from its header on. `position` is what the next byte of `input` is called in byte ranges
    /// and errors: its offset in the file, or 0.
    pub fn new(input: R, position: FileOffset) -> StreamReader<R> {
        StreamReader::with(input, position, State::Header)
    }

    /// Reads sections and commands without a header, and without the need of an end mark: the content of a package, a
    /// postcopy stream after a recovery, or the bare records of a preempt channel.
    pub fn headless(input: R, position: FileOffset) -> StreamReader<R> {
        StreamReader::with(input, position, State::Sections)
    }

    fn with(input: R, position: FileOffset, state: State) -> StreamReader<R> {
        let needs_eof = state == State::Header;
        StreamReader { input, at: position.0, held: None, state, footer_due: None, names: BTreeMap::new(), needs_eof }
    }

    /// Where the next byte is.
    pub fn position(&self) -> FileOffset {
        FileOffset(self.at)
    }

    /// The next piece, or `None` after the last one. After [`Event::Eof`] the call waits for the description or the
    /// end of the input: on a socket that stays open, do not make it.
    ///
    /// # Errors
    /// If the input fails, ends in the middle, or is no valid stream. Do not go on then.
    pub fn next_event(&mut self) -> Result<Option<Located>, StreamError> {
        let start = self.at;
        let event = match self.state {
            State::Header => Some(self.header()?),
            State::Sections => self.section(start)?,
            State::AfterEof => self.description(start)?,
            State::Done => None,
        };
        Ok(event.map(|event| Located { range: FileOffset(start)..FileOffset(self.at), event }))
    }

    fn header(&mut self) -> Result<Event, StreamError> {
        let at = self.at;
        let found = self.read_u32("the stream header")?;
        if found != MAGIC {
            return Err(StreamError::Magic { at: FileOffset(at), found });
        }
        let at = self.at;
        let found = self.read_u32("the stream header")?;
        if found != VERSION {
            return Err(StreamError::Version { at: FileOffset(at), found });
        }
        self.state = State::Sections;
        Ok(Event::Header)
    }

    fn section(&mut self, start: u64) -> Result<Option<Event>, StreamError> {
        let Some(kind) = self.next_byte()? else {
            self.state = State::Done;
            if self.needs_eof || self.footer_due.is_some() {
                return Err(StreamError::Truncated { what: "the stream", at: FileOffset(start) });
            }
            return Ok(None);
        };
        if let Some(id) = self.footer_due.take() {
            return self.footer(start, id, kind).map(Some);
        }
        let event = match kind {
            byte::EOF => {
                self.state = State::AfterEof;
                Event::Eof
            }
            byte::START => Event::Section(self.named_section(SectionKind::Start)?),
            byte::FULL => Event::Section(self.named_section(SectionKind::Full)?),
            byte::PART => Event::Section(self.part_section(SectionKind::Part)?),
            byte::END => Event::Section(self.part_section(SectionKind::End)?),
            byte::CONFIGURATION => Event::Configuration(self.configuration()?),
            byte::COMMAND => {
                let number = self.read_u16("a command")?;
                let length = self.read_u16("a command")?;
                let mut payload = vec![0; usize::from(length)];
                self.read_bytes(&mut payload, "the payload of a command")?;
                Event::Command(RawCommand { number, payload })
            }
            found => return Err(StreamError::SectionType { at: FileOffset(start), found }),
        };
        Ok(Some(event))
    }

    fn footer(&mut self, start: u64, id: u32, found: u8) -> Result<Event, StreamError> {
        let at = FileOffset(start);
        if found != byte::FOOTER {
            return Err(StreamError::Footer { at, id, found, found_id: 0 });
        }
        let found_id = self.read_u32("a section footer")?;
        if found_id != id {
            return Err(StreamError::Footer { at, id, found, found_id });
        }
        Ok(Event::Footer(id))
    }

    fn named_section(&mut self, kind: SectionKind) -> Result<SectionHeader, StreamError> {
        let id = self.read_u32("a section header")?;
        let name = self.read_counted("the name of a section")?;
        let instance = self.read_u32("a section header")?;
        let version = self.read_u32("a section header")?;
        let name = SectionName { name, instance, version };
        if kind == SectionKind::Start {
            // QEMU's loader, too, goes by the first section that had the id.
            self.names.entry(id).or_insert_with(|| name.clone());
        }
        self.footer_due = Some(id);
        Ok(SectionHeader { kind, id, name: Some(name) })
    }

    fn part_section(&mut self, kind: SectionKind) -> Result<SectionHeader, StreamError> {
        let id = self.read_u32("a section header")?;
        self.footer_due = Some(id);
        Ok(SectionHeader { kind, id, name: self.names.get(&id).cloned() })
    }

    fn configuration(&mut self) -> Result<Configuration, StreamError> {
        let at = self.at;
        let length = self.read_u32("the machine type")?;
        if length > MAX_MACHINE {
            return Err(StreamError::invalid(format!("a machine type name of {length} bytes"), at));
        }
        let machine = self.read_string(length as usize, "the machine type")?;
        let mut parts = Vec::new();
        loop {
            match self.next_byte()? {
                Some(byte::SUBSECTION) => parts.push(self.configuration_part()?),
                Some(other) => {
                    self.unread(other);
                    break;
                }
                None => break,
            }
            if parts.len() > 16 {
                return Err(StreamError::invalid("more than 16 configuration subsections", self.at));
            }
        }
        Ok(Configuration { machine, parts })
    }

    fn configuration_part(&mut self) -> Result<ConfigurationPart, StreamError> {
        let at = self.at;
        let name = self.read_counted("the name of a configuration subsection")?;
        let version = self.read_u32("a configuration subsection")?;
        match (name.as_str(), version) {
            ("configuration/target-page-bits", 1) => {
                Ok(ConfigurationPart::TargetPageBits(self.read_u32("the target page bits")?))
            }
            ("configuration/capabilities", 1) => {
                let count = self.read_u32("the capabilities")?;
                if count > MAX_CAPABILITIES {
                    return Err(StreamError::invalid(format!("a list of {count} capabilities"), at));
                }
                let names = (0..count).map(|_| self.read_counted("the name of a capability"));
                Ok(ConfigurationPart::Capabilities(names.collect::<Result<_, _>>()?))
            }
            ("configuration/uuid", 1) => {
                let mut uuid = [0; 16];
                self.read_bytes(&mut uuid, "the UUID")?;
                Ok(ConfigurationPart::Uuid(uuid))
            }
            _ => Err(StreamError::invalid(format!("unknown configuration subsection \"{name}\" v{version}"), at)),
        }
    }

    fn description(&mut self, start: u64) -> Result<Option<Event>, StreamError> {
        self.state = State::Done;
        match self.next_byte()? {
            None => Ok(None),
            Some(byte::VMDESCRIPTION) => {
                let length = self.read_u32("the length of the device description")?;
                if length > MAX_VMDESC {
                    return Err(StreamError::invalid(format!("a device description of {length} bytes"), start));
                }
                Ok(Some(Event::VmDesc(self.read_vec(length, "the device description")?)))
            }
            Some(found) => Err(StreamError::SectionType { at: FileOffset(start), found }),
        }
    }
}

/// The encodings of the format, for bodies.
impl<R: Read> StreamReader<R> {
    /// One byte.
    ///
    /// # Errors
    /// As all of these: if the input fails or ends; `what` names what was being read.
    pub fn read_u8(&mut self, what: &'static str) -> Result<u8, StreamError> {
        self.read_array::<1>(what).map(|[byte]| byte)
    }

    /// A big-endian number.
    ///
    /// # Errors
    /// If the input fails or ends.
    pub fn read_u16(&mut self, what: &'static str) -> Result<u16, StreamError> {
        self.read_array(what).map(u16::from_be_bytes)
    }

    /// A big-endian number.
    ///
    /// # Errors
    /// If the input fails or ends.
    pub fn read_u32(&mut self, what: &'static str) -> Result<u32, StreamError> {
        self.read_array(what).map(u32::from_be_bytes)
    }

    /// A big-endian number.
    ///
    /// # Errors
    /// If the input fails or ends.
    pub fn read_u64(&mut self, what: &'static str) -> Result<u64, StreamError> {
        self.read_array(what).map(u64::from_be_bytes)
    }

    /// A length byte and so many bytes of a name.
    ///
    /// # Errors
    /// If the input fails or ends, or the name is not UTF-8.
    pub fn read_counted(&mut self, what: &'static str) -> Result<String, StreamError> {
        let length = self.read_u8(what)?;
        self.read_string(usize::from(length), what)
    }

    /// Exactly as many bytes as `to` holds.
    ///
    /// # Errors
    /// If the input fails or ends.
    pub fn read_bytes(&mut self, to: &mut [u8], what: &'static str) -> Result<(), StreamError> {
        let at = FileOffset(self.at);
        self.read_exact(to).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => StreamError::Truncated { what, at },
            _ => StreamError::Io { what, at, error },
        })
    }

    /// So many bytes. Allocates only as much as arrives.
    ///
    /// # Errors
    /// If the input fails or ends.
    pub fn read_vec(&mut self, length: u32, what: &'static str) -> Result<Vec<u8>, StreamError> {
        let at = FileOffset(self.at);
        let mut bytes = Vec::new();
        let got = self.by_ref().take(u64::from(length)).read_to_end(&mut bytes);
        match got {
            Ok(got) if got == length as usize => Ok(bytes),
            Ok(_) => Err(StreamError::Truncated { what, at }),
            Err(error) => Err(StreamError::Io { what, at, error }),
        }
    }

    /// Leaves out so many bytes.
    ///
    /// # Errors
    /// If the input fails or ends.
    pub fn skip(&mut self, length: u64, what: &'static str) -> Result<(), StreamError> {
        let at = FileOffset(self.at);
        match io::copy(&mut self.by_ref().take(length), &mut io::sink()) {
            Ok(got) if got == length => Ok(()),
            Ok(_) => Err(StreamError::Truncated { what, at }),
            Err(error) => Err(StreamError::Io { what, at, error }),
        }
    }

    /// The input, and the byte that was read too far, if any: only between a configuration and what follows it.
    pub fn into_inner(self) -> (R, Option<u8>) {
        (self.input, self.held)
    }

    /// The input. What is read from it directly is not counted in [`position`](StreamReader::position).
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.input
    }

    fn read_array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.read_bytes(&mut bytes, what)?;
        Ok(bytes)
    }

    fn read_string(&mut self, length: usize, what: &'static str) -> Result<String, StreamError> {
        let at = self.at;
        let mut bytes = vec![0; length];
        self.read_bytes(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| StreamError::invalid(format!("{what} is not UTF-8"), at))
    }

    /// The next byte, or `None` at the end of the input.
    fn next_byte(&mut self) -> Result<Option<u8>, StreamError> {
        let mut byte = [0];
        loop {
            match self.read(&mut byte) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(Some(byte[0])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(StreamError::Io { what: "a section type", at: FileOffset(self.at), error });
                }
            }
        }
    }

    fn unread(&mut self, byte: u8) {
        self.held = Some(byte);
        self.at -= 1;
    }
}

impl<R: io::Seek> StreamReader<R> {
    /// Goes on at another place of a seekable input, whose position 0 is that of the file.
    ///
    /// # Errors
    /// If the input can't seek there.
    pub fn seek_to(&mut self, position: FileOffset) -> Result<(), StreamError> {
        self.held = None;
        self.at = position.0;
        let moved = self.input.seek(io::SeekFrom::Start(position.0));
        moved.map(drop).map_err(|error| StreamError::Io { what: "the stream", at: position, error })
    }
}

impl<R: Read> Read for StreamReader<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let got = match (self.held.take(), to.first_mut()) {
            (Some(byte), Some(first)) => {
                *first = byte;
                1
            }
            (held, None) => {
                self.held = held;
                0
            }
            (None, Some(_)) => self.input.read(to)?,
        };
        self.at = self.at.saturating_add(got as u64);
        Ok(got)
    }
}
