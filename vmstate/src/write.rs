//! Writing a stream.

use std::io::Write;

use page_units::ByteLen;

use crate::{Command, Event, MAGIC, RawCommand, SectionHeader, VERSION, WriteError, kind};

/// Writes a migration stream, part by part; the mirror image of [`StreamReader`](crate::StreamReader). Keeps nothing:
/// what is written is what was asked for, in that order. A writer to a socket should be buffered.
#[derive(Debug)]
pub struct StreamWriter<W> {
    out: W,
}

impl<W: Write> StreamWriter<W> {
    /// A writer into `out`.
    pub fn new(out: W) -> StreamWriter<W> {
        StreamWriter { out }
    }

    /// Writes one part. The bodies of sections are written by the caller, through [`get_mut`](Self::get_mut) or the
    /// methods below, between the section's header and its footer.
    ///
    /// # Errors
    /// If the system can't write, or a name or text is too long for the stream.
    pub fn event(&mut self, event: &Event) -> Result<(), WriteError> {
        let out = &mut self.out;
        match event {
            Event::Header => {
                out.u32(MAGIC)?;
                out.u32(VERSION)?;
            }
            Event::Configuration(configuration) => {
                out.u8(kind::CONFIGURATION)?;
                configuration.write(out)?;
            }
            Event::Command(RawCommand { number, payload }) => {
                let Ok(length) = u16::try_from(payload.len()) else {
                    return Err(WriteError::TooLong { what: "a command", length: ByteLen::of(payload.len()) });
                };
                out.u8(kind::COMMAND)?;
                out.u16(*number)?;
                out.u16(length)?;
                out.write_all(payload)?;
            }
            Event::SectionStart(header) => section(out, kind::START, header)?,
            Event::SectionFull(header) => section(out, kind::FULL, header)?,
            Event::SectionPart { id } => tagged(out, kind::PART, *id)?,
            Event::SectionEnd { id } => tagged(out, kind::END, *id)?,
            Event::Footer { id } => tagged(out, kind::FOOTER, *id)?,
            Event::Eof => out.u8(kind::EOF)?,
            Event::VmDesc(text) => {
                out.u8(kind::VMDESCRIPTION)?;
                out.u32_len("the description of the device state", text.len())?;
                out.write_all(text)?;
            }
        }
        Ok(())
    }

    /// Writes a command.
    ///
    /// # Errors
    /// As [`event`](Self::event).
    pub fn command(&mut self, command: &Command) -> Result<(), WriteError> {
        self.event(&Event::Command(command.encode()?))
    }

    /// Writes bytes of a section's body.
    ///
    /// # Errors
    /// If the system can't write.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        Ok(self.out.write_all(bytes)?)
    }

    /// Writes a big-endian integer of a section's body.
    ///
    /// # Errors
    /// If the system can't write.
    pub fn u64(&mut self, value: u64) -> Result<(), WriteError> {
        self.out.u64(value)
    }

    /// Writes a counted string of a section's body.
    ///
    /// # Errors
    /// If the system can't write, or the text is longer than 255 bytes.
    pub fn counted_string(&mut self, text: &str) -> Result<(), WriteError> {
        self.out.counted_string(text)
    }

    /// What it writes into.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.out
    }

    /// What it wrote into.
    pub fn into_inner(self) -> W {
        self.out
    }
}

fn section(out: &mut impl Write, kind: u8, header: &SectionHeader) -> Result<(), WriteError> {
    tagged(out, kind, header.id)?;
    out.counted_string(&header.name)?;
    out.u32(header.instance)?;
    out.u32(header.version)
}

fn tagged(out: &mut impl Write, kind: u8, id: u32) -> Result<(), WriteError> {
    out.u8(kind)?;
    out.u32(id)
}

/// The units of the stream on any writer.
pub(crate) trait Put: Write {
    fn u8(&mut self, value: u8) -> Result<(), WriteError> {
        Ok(self.write_all(&[value])?)
    }

    fn u16(&mut self, value: u16) -> Result<(), WriteError> {
        Ok(self.write_all(&value.to_be_bytes())?)
    }

    fn u32(&mut self, value: u32) -> Result<(), WriteError> {
        Ok(self.write_all(&value.to_be_bytes())?)
    }

    fn u64(&mut self, value: u64) -> Result<(), WriteError> {
        Ok(self.write_all(&value.to_be_bytes())?)
    }

    fn u32_len(&mut self, what: &'static str, length: usize) -> Result<(), WriteError> {
        match u32::try_from(length) {
            Ok(value) => self.u32(value),
            Err(_) => Err(WriteError::TooLong { what, length: ByteLen::of(length) }),
        }
    }

    fn counted_string(&mut self, text: &str) -> Result<(), WriteError> {
        let Ok(length) = u8::try_from(text.len()) else {
            return Err(WriteError::NameTooLong { name: text.to_owned() });
        };
        self.u8(length)?;
        Ok(self.write_all(text.as_bytes())?)
    }
}

impl<W: Write + ?Sized> Put for W {}
