//! The bytes that the stream is made of: big-endian integers and counted strings, read with a position.

use std::io::{ErrorKind, Read};

use page_units::{ByteLen, FileOffset};

use crate::StreamError;

/// A reader that knows where it is.
#[derive(Debug)]
pub(crate) struct Wire<R> {
    pub(crate) inner: R,
    pub(crate) at: u64,
    peeked: Option<u8>,
}

impl<R> Wire<R> {
    pub(crate) fn new(inner: R, at: FileOffset) -> Wire<R> {
        Wire { inner, at: at.0, peeked: None }
    }

    /// Where the next byte comes from.
    pub(crate) fn position(&self) -> FileOffset {
        FileOffset(self.at)
    }

    pub(crate) fn forget_peeked(&mut self) {
        self.peeked = None;
    }

    pub(crate) fn is_peeked(&self) -> bool {
        self.peeked.is_some()
    }

    pub(crate) fn invalid(&self, what: impl Into<String>) -> StreamError {
        StreamError::Invalid { at: self.position(), what: what.into() }
    }
}

impl<R: Read> Wire<R> {
    /// Fills `buffer`.
    pub(crate) fn fill(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), StreamError> {
        let mut rest = buffer;
        if let Some(byte) = self.peeked.take_if(|_| !rest.is_empty()) {
            rest[0] = byte;
            rest = &mut rest[1..];
            self.at += 1;
        }
        while !rest.is_empty() {
            match self.inner.read(rest) {
                Ok(0) => return Err(StreamError::Truncated { at: self.position(), what }),
                Ok(n) => {
                    self.at = self.at.saturating_add(n as u64);
                    rest = rest.get_mut(n..).unwrap_or_default();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(StreamError::Io { at: self.position(), error }),
            }
        }
        Ok(())
    }

    /// The next byte, which stays where it is; `None` at the end.
    pub(crate) fn peek(&mut self) -> Result<Option<u8>, StreamError> {
        if self.peeked.is_none() {
            let mut byte = [0];
            loop {
                match self.inner.read(&mut byte) {
                    Ok(0) => return Ok(None),
                    Ok(_) => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(StreamError::Io { at: self.position(), error }),
                }
            }
            self.peeked = Some(byte[0]);
        }
        Ok(self.peeked)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, StreamError> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, StreamError> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, StreamError> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, StreamError> {
        Ok(u64::from_be_bytes(self.array(what)?))
    }

    /// `length` bytes, in memory that grows only with what really comes.
    pub(crate) fn vec(&mut self, length: u64, limit: u64, what: &'static str) -> Result<Vec<u8>, StreamError> {
        let at = self.position();
        if length > limit {
            return Err(StreamError::TooLong { at, what, length: ByteLen(length), limit: ByteLen(limit) });
        }
        let mut bytes = Vec::new();
        let mut rest = length;
        while rest > 0 {
            let step = usize::try_from(rest.min(1 << 20)).unwrap_or(1 << 20);
            let old = bytes.len();
            bytes.resize(old + step, 0);
            self.fill(&mut bytes[old..], what)?;
            rest -= step as u64;
        }
        Ok(bytes)
    }

    pub(crate) fn skip(&mut self, length: u64, what: &'static str) -> Result<(), StreamError> {
        let mut sink = [0; 4096];
        let mut rest = length;
        while rest > 0 {
            let step = usize::try_from(rest.min(sink.len() as u64)).unwrap_or(sink.len());
            self.fill(&mut sink[..step], what)?;
            rest -= step as u64;
        }
        Ok(())
    }

    /// A string of a known length, without control characters: it will be shown to people.
    pub(crate) fn string(&mut self, length: u64, limit: u64, what: &'static str) -> Result<String, StreamError> {
        let at = self.position();
        let bytes = self.vec(length, limit, what)?;
        String::from_utf8(bytes)
            .ok()
            .filter(|text| !text.chars().any(char::is_control))
            .ok_or_else(|| StreamError::Invalid { at, what: format!("{what} is not text") })
    }

    /// Reads a text with its length in one byte before it.
    pub(crate) fn counted_string(&mut self, what: &'static str) -> Result<String, StreamError> {
        let length = self.u8(what)?;
        self.string(length.into(), 255, what)
    }
}
