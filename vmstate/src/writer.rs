//! Writes a stream, to a file or a socket.

use std::io::{self, Write};

use page_units::FileOffset;

use crate::command::push_counted;
use crate::event::{MAGIC, VERSION, byte};
use crate::{Command, Configuration, ConfigurationPart, EncodeError, Event, SectionHeader, SectionKind};

/// Writes a stream piece by piece.
///
/// [`event`](StreamWriter::event) writes what [`StreamReader`](crate::StreamReader) reads, byte for byte. The body of a
/// section goes through the writer itself, which is [`Write`], between the events of its header and its footer.
#[derive(Debug)]
pub struct StreamWriter<W> {
    output: W,
    at: u64,
}

impl<W: Write> StreamWriter<W> {
    /// Writes to `output`, whose next byte is at `position`.
    pub const fn new(output: W, position: FileOffset) -> StreamWriter<W> {
        StreamWriter { output, at: position.0 }
    }

    /// Where the next byte goes.
    pub const fn position(&self) -> FileOffset {
        FileOffset(self.at)
    }

    /// Writes one piece.
    ///
    /// # Errors
    /// If the output fails, or something is too long for the format; then nothing was written.
    pub fn event(&mut self, event: &Event) -> Result<(), EncodeError> {
        let mut bytes = Vec::new();
        encode(event, &mut bytes)?;
        Ok(self.write_all(&bytes)?)
    }

    /// Writes the header and the configuration.
    ///
    /// # Errors
    /// As [`event`](StreamWriter::event).
    pub fn begin(&mut self, configuration: &Configuration) -> Result<(), EncodeError> {
        self.event(&Event::Header)?;
        self.event(&Event::Configuration(configuration.clone()))
    }

    /// Writes a command.
    ///
    /// # Errors
    /// As [`event`](StreamWriter::event).
    pub fn command(&mut self, command: &Command) -> Result<(), EncodeError> {
        self.event(&Event::Command(command.encode()?))
    }

    /// Writes a whole section: header, body, footer.
    ///
    /// # Errors
    /// As [`event`](StreamWriter::event).
    pub fn section(&mut self, header: &SectionHeader, body: &[u8]) -> Result<(), EncodeError> {
        let mut bytes = Vec::with_capacity(body.len() + 64);
        encode(&Event::Section(header.clone()), &mut bytes)?;
        bytes.extend(body);
        encode(&Event::Footer(header.id), &mut bytes)?;
        Ok(self.write_all(&bytes)?)
    }

    /// The output.
    pub fn into_inner(self) -> W {
        self.output
    }

    /// The output. What is written to it directly is not counted in [`position`](StreamWriter::position).
    pub const fn get_mut(&mut self) -> &mut W {
        &mut self.output
    }
}

impl<W: Write> Write for StreamWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let put = self.output.write(bytes)?;
        self.at = self.at.saturating_add(put as u64);
        Ok(put)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

pub(crate) fn encode(event: &Event, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    match event {
        Event::Header => {
            out.extend(MAGIC.to_be_bytes());
            out.extend(VERSION.to_be_bytes());
        }
        Event::Configuration(configuration) => encode_configuration(configuration, out)?,
        Event::Command(command) => {
            out.push(byte::COMMAND);
            out.extend(command.number.to_be_bytes());
            let limit = usize::from(u16::MAX);
            let length = u16::try_from(command.payload.len());
            let length =
                length.map_err(|_| EncodeError::Length { what: "a command", length: command.payload.len(), limit })?;
            out.extend(length.to_be_bytes());
            out.extend(&command.payload);
        }
        Event::Section(header) => encode_section(header, out)?,
        Event::Footer(id) => {
            out.push(byte::FOOTER);
            out.extend(id.to_be_bytes());
        }
        Event::Eof => out.push(byte::EOF),
        Event::VmDesc(json) => {
            out.push(byte::VMDESCRIPTION);
            put_length(out, json.len(), "the device description")?;
            out.extend(json);
        }
    }
    Ok(())
}

fn encode_section(header: &SectionHeader, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let named = match header.kind {
        SectionKind::Start => Some(byte::START),
        SectionKind::Full => Some(byte::FULL),
        SectionKind::Part | SectionKind::End => None,
    };
    match (named, &header.name) {
        (Some(kind), Some(name)) => {
            out.push(kind);
            out.extend(header.id.to_be_bytes());
            push_counted(out, &name.name)?;
            out.extend(name.instance.to_be_bytes());
            out.extend(name.version.to_be_bytes());
        }
        (Some(_), None) => return Err(EncodeError::Unnamed),
        (None, _) => {
            out.push(if header.kind == SectionKind::Part { byte::PART } else { byte::END });
            out.extend(header.id.to_be_bytes());
        }
    }
    Ok(())
}

fn encode_configuration(configuration: &Configuration, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    out.push(byte::CONFIGURATION);
    put_length(out, configuration.machine.len(), "the machine type")?;
    out.extend(configuration.machine.as_bytes());
    for part in &configuration.parts {
        put_subsection(out, part.name(), 1)?;
        match part {
            ConfigurationPart::TargetPageBits(bits) => out.extend(bits.to_be_bytes()),
            ConfigurationPart::Capabilities(names) => {
                put_length(out, names.len(), "the list of capabilities")?;
                for name in names {
                    push_counted(out, name)?;
                }
            }
            ConfigurationPart::Uuid(uuid) => out.extend(uuid),
        }
    }
    Ok(())
}

/// What stands before the fields of a subsection.
pub(crate) fn put_subsection(out: &mut Vec<u8>, name: &str, version: u32) -> Result<(), EncodeError> {
    out.push(byte::SUBSECTION);
    push_counted(out, name)?;
    out.extend(version.to_be_bytes());
    Ok(())
}

fn put_length(out: &mut Vec<u8>, length: usize, what: &'static str) -> Result<(), EncodeError> {
    let limit = u32::MAX as usize;
    let short = u32::try_from(length).map_err(|_| EncodeError::Length { what, length, limit })?;
    out.extend(short.to_be_bytes());
    Ok(())
}
