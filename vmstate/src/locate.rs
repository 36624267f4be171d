//! Finding the description of the device state from the end of a file: the devices before it can only be split with it.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use page_units::{ByteLen, FileOffset};

use crate::wire::Wire;
use crate::{Located, MAX_VMDESC, StreamError, kind};

/// How much of the file is looked at first; then twice as much each time.
const STEP: u64 = 16 << 10;
/// Type and length in front of the text.
const PREFIX: u64 = 5;

/// The description of the device state in the last bytes of `range`, in which a stream is. `None` if nothing there
/// looks like one: it was not written, or the file is incomplete.
///
/// The text has no NUL byte and is preceded by its length, whose first byte is 0 (a description is shorter than
/// 16 MiB): it is found behind the last NUL of the file, as QEMU's `scripts/analyze-migration.py` does. Zeros that
/// somebody padded the file with are passed over.
///
/// # Errors
/// If the file can't be read.
pub fn find_vmdesc<R: Read + Seek>(
    file: &mut R,
    range: Range<FileOffset>,
) -> Result<Option<Located<Vec<u8>>>, StreamError> {
    let (first, end) = (range.start.0, range.end.0);
    let lowest = end.saturating_sub(MAX_VMDESC.0 + PREFIX).max(first);
    let Some(last_text) = last(file, lowest..end, |byte| byte != 0)? else {
        return Ok(None);
    };
    let Some(last_nul) = last(file, lowest..last_text, |byte| byte == 0)? else {
        return Ok(None);
    };
    // Any of the four bytes of the length may be the last that is 0.
    for text in (last_nul + 1..=last_nul + 4).filter(|text| *text < end) {
        let Some(start) = text.checked_sub(PREFIX).filter(|start| *start >= first) else {
            continue;
        };
        let prefix = read_at(file, start, PREFIX + 1)?;
        let length = u64::from(u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]));
        if prefix[0] == kind::VMDESCRIPTION && prefix[5] == b'{' && length <= end - text {
            let value = read_at(file, text, length)?;
            return Ok(Some(Located { value, range: FileOffset(start)..FileOffset(text + length) }));
        }
    }
    Ok(None)
}

/// Where the last byte of a kind is.
fn last<R: Read + Seek>(
    file: &mut R,
    range: Range<u64>,
    wanted: impl Fn(u8) -> bool,
) -> Result<Option<u64>, StreamError> {
    let mut at = range.end;
    let mut step = STEP;
    while at > range.start {
        let from = at.saturating_sub(step).max(range.start);
        let bytes = read_at(file, from, at - from)?;
        if let Some(index) = bytes.iter().rposition(|byte| wanted(*byte)) {
            return Ok(Some(from + index as u64));
        }
        at = from;
        step *= 2;
    }
    Ok(None)
}

fn read_at<R: Read + Seek>(file: &mut R, at: u64, length: u64) -> Result<Vec<u8>, StreamError> {
    let at = FileOffset(at);
    file.seek(SeekFrom::Start(at.0)).map_err(|error| StreamError::Io { at, error })?;
    Wire::new(file, at).vec(length, ByteLen(u64::MAX).0, "the description of the device state")
}
