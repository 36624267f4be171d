//! Reading a file with `pread`, so that its own position is left alone.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::rc::Rc;

use crate::bytes::Bytes;

/// The last bytes of a file, read at once: the state of the devices and its description are there.
#[derive(Debug)]
pub(crate) struct Tail {
    at: u64,
    bytes: Vec<u8>,
}

impl Tail {
    /// The usual state of a small guest; of a large one the rest is read when it is needed.
    const LEN: u64 = 20 << 10;

    /// The bytes of the range's end.
    pub(crate) fn read(file: &Bytes, range: Range<u64>) -> io::Result<Tail> {
        let at = range.end.saturating_sub(Tail::LEN).max(range.start);
        let mut bytes = vec![0; usize::try_from(range.end.saturating_sub(at)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, at)?;
        Ok(Tail { at, bytes })
    }

    /// What it has from `at` on.
    fn from(&self, at: u64) -> Option<&[u8]> {
        let skip = usize::try_from(at.checked_sub(self.at)?).ok()?;
        self.bytes.get(skip..).filter(|rest| !rest.is_empty())
    }
}

/// A position in a file, up to a fixed end.
#[derive(Clone, Debug)]
pub(crate) struct Cursor<'a> {
    file: &'a Bytes,
    tail: Rc<Tail>,
    at: u64,
    end: u64,
}

impl<'a> Cursor<'a> {
    /// At the beginning of the range.
    pub(crate) fn new(file: &'a Bytes, range: Range<u64>) -> io::Result<Cursor<'a>> {
        let tail = Rc::new(Tail::read(file, range.clone())?);
        Ok(Cursor { file, tail, at: range.start, end: range.end })
    }
}

impl Read for Cursor<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let length = buffer.len().min(left);
        let read = match self.tail.from(self.at) {
            Some(mut known) => known.read(&mut buffer[..length])?,
            None => self.file.read_at(&mut buffer[..length], self.at)?,
        };
        self.at += read as u64;
        Ok(read)
    }
}

impl Seek for Cursor<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}
