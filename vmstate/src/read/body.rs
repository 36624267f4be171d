//! Reading the body of a section.

use std::io::Read;

use page_units::ByteLen;

use super::StreamReader;
use crate::StreamError;

impl<R: Read> StreamReader<R> {
    /// Reads a body: fills `buffer`.
    ///
    /// # Errors
    /// If the stream ends before, or can't be read.
    pub fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), StreamError> {
        self.wire.fill(buffer, "the body of a section")
    }

    /// Reads a body: `length` bytes, which must not be more than `limit`.
    ///
    /// # Errors
    /// If they are more, the stream ends before, or can't be read.
    pub fn read_vec(&mut self, length: ByteLen, limit: ByteLen) -> Result<Vec<u8>, StreamError> {
        self.wire.vec(length.0, limit.0, "the body of a section")
    }

    /// Reads a body: everything until the end of the input, which must not be more than `limit` bytes.
    ///
    /// # Errors
    /// If it is more, or can't be read.
    pub fn read_to_end(&mut self, limit: ByteLen) -> Result<Vec<u8>, StreamError> {
        let at = self.position();
        let mut bytes = Vec::new();
        while self.wire.peek()?.is_some() {
            // The byte that was looked at, and then as much as there is.
            bytes.push(self.wire.u8("the stream")?);
            let room = limit.0.saturating_sub(bytes.len() as u64).saturating_add(1);
            let mut part = Read::by_ref(&mut self.wire.inner).take(room.min(1 << 20));
            let read = part.read_to_end(&mut bytes).map_err(|error| StreamError::Io { at, error })?;
            self.wire.at = self.wire.at.saturating_add(read as u64);
            if bytes.len() as u64 > limit.0 {
                let length = ByteLen::of(bytes.len());
                return Err(StreamError::TooLong { at, what: "the rest of the stream", length, limit });
            }
        }
        Ok(bytes)
    }

    /// Reads a body: one byte.
    ///
    /// # Errors
    /// If the stream ends before, or can't be read.
    pub fn u8(&mut self) -> Result<u8, StreamError> {
        self.wire.u8("the body of a section")
    }

    /// Reads a body: a big-endian integer.
    ///
    /// # Errors
    /// If the stream ends before, or can't be read.
    pub fn u16(&mut self) -> Result<u16, StreamError> {
        self.wire.u16("the body of a section")
    }

    /// Reads a body: a big-endian integer.
    ///
    /// # Errors
    /// If the stream ends before, or can't be read.
    pub fn u32(&mut self) -> Result<u32, StreamError> {
        self.wire.u32("the body of a section")
    }

    /// Reads a body: a big-endian integer.
    ///
    /// # Errors
    /// If the stream ends before, or can't be read.
    pub fn u64(&mut self) -> Result<u64, StreamError> {
        self.wire.u64("the body of a section")
    }

    /// Reads a text with its length in one byte before it.
    ///
    /// # Errors
    /// If the stream ends before, can't be read, or the text is not UTF-8.
    pub fn counted_string(&mut self) -> Result<String, StreamError> {
        self.wire.counted_string("a name")
    }

    /// Skips `length` bytes of a body by reading them.
    ///
    /// # Errors
    /// If the stream ends before, or can't be read.
    pub fn skip(&mut self, length: ByteLen) -> Result<(), StreamError> {
        self.wire.skip(length.0, "the body of a section")
    }
}
