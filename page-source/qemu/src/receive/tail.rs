//! The device state: nothing in the stream tells how long a section is, until the description at its very end.

use std::collections::HashSet;
use std::io::{Cursor, Read};
use std::ops::Range;

use page_units::{ByteLen, FileOffset};
use vmstate::{Event, Located, SectionHeader, StreamError, StreamReader, StreamWriter, VmDesc, find_vmdesc, walk};

use super::error::ReadError;

/// The most device state that is believed. It goes through memory, which grows only with what really comes.
const MOST: ByteLen = ByteLen(1 << 30);

/// The first section of a device, whose header was read.
#[derive(Debug)]
pub(super) struct First {
    pub(super) header: SectionHeader,
    pub(super) range: Range<FileOffset>,
}

/// Reads everything up to the end of the stream; what was read of the first section before is put in front again.
pub(super) fn read<R: Read>(from: &mut StreamReader<R>, first: First) -> Result<Located<Vec<u8>>, ReadError> {
    let at = first.range.start;
    let mut out = StreamWriter::new(Vec::new());
    out.event(&Event::SectionFull(first.header))
        .map_err(|error| ReadError::Foreign { at, what: format!("a section without a usable header: {error}") })?;
    let mut value = out.into_inner();
    value.extend_from_slice(&from.read_to_end(MOST)?);
    Ok(Located { value, range: at..from.position() })
}

/// Whether it is complete: the sections of devices that the description at the end describes, one after the other with
/// their footers, then the end mark, the description, and nothing more.
pub(super) fn check(bytes: &[u8], at: FileOffset) -> Result<(), ReadError> {
    let end = FileOffset(at.0.saturating_add(bytes.len() as u64));
    let within = FileOffset(0)..FileOffset(bytes.len() as u64);
    let Some(text) = find_vmdesc(&mut Cursor::new(bytes), within.clone())? else {
        return Err(ReadError::NoDescription { at: end });
    };
    let vmdesc = VmDesc::parse(&text.value).map_err(|error| {
        let text_at = text.range.end.0.saturating_sub(text.value.len() as u64);
        ReadError::Description { at: FileOffset(at.0.saturating_add(text_at)), error }
    })?;
    let mut stream = StreamReader::nested(bytes, at);
    let (mut ended, mut seen) = (false, HashSet::new());
    while let Some(event) = stream.next_event()? {
        let here = event.range.start;
        match event.value {
            Event::SectionFull(header) => {
                if !seen.insert((header.name.clone(), header.instance)) {
                    let what = format!("a second state of device \"{}\" {}", header.name, header.instance);
                    return Err(ReadError::Foreign { at: here, what });
                }
                let desc = vmdesc.device(&header.name, header.instance);
                let length = desc.and_then(|desc| Some((desc, desc.body_len()?)));
                let Some((desc, length)) = length else {
                    let what = format!("device \"{}\" has state that is not described", header.name);
                    return Err(ReadError::Foreign { at: here, what });
                };
                let body_at = stream.position();
                let body = stream.read_vec(length, MOST)?;
                walk(&body, body_at, desc).map_err(|error| ReadError::Device { device: header.name, error })?;
            }
            Event::Footer { .. } | Event::VmDesc(_) => {}
            Event::Eof => ended = true,
            _ => {
                let what = "something that is no device state, after RAM".to_owned();
                return Err(ReadError::Foreign { at: here, what });
            }
        }
    }
    let here = stream.position();
    if !ended || text.range.end != within.end {
        return Err(ReadError::NoDescription { at: here });
    }
    match here == end {
        true => Ok(()),
        false => Err(StreamError::Invalid { at: here, what: "bytes after the end of the stream".to_owned() }.into()),
    }
}
