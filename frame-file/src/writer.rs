//! Writing a file, frame by frame.

use std::io::{self, Write};

use page_units::{ByteLen, FileOffset};

use crate::format::{MAX_FRAME, MAX_FRAMES, MAX_ZEROS};
use crate::tree::{self, Entry};
use crate::{Codec, Digest, EncodeError, Encoded, zeros};

/// Appends frames to `W` in the order of the file. Keeps 40 bytes in memory for each frame.
#[derive(Debug)]
pub struct FrameWriter<W> {
    to: W,
    codec: Codec,
    frame_limit: ByteLen,
    entries: Vec<Entry>,
    encoded: FileOffset,
    decoded: FileOffset,
    zeros: ByteLen,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Summary {
    /// Who trusts it trusts every byte that is read from the file.
    pub root: Digest,
    /// How many frames there are.
    pub frames: u64,
    /// How many bytes the file decodes to.
    pub decoded: ByteLen,
    /// How many of them stand in frames of zeros.
    pub zeros: ByteLen,
    /// The length of the file.
    pub encoded: ByteLen,
    /// The part of it that is index and seek table.
    pub index: ByteLen,
}

impl<W: Write> FrameWriter<W> {
    /// A writer of frames of `codec` that decode to at most `frame_limit` bytes each, which is brought into the range
    /// from 1 to [`MAX_FRAME`].
    pub fn new(to: W, codec: Codec, frame_limit: ByteLen) -> FrameWriter<W> {
        let frame_limit = frame_limit.clamp(ByteLen(1), MAX_FRAME);
        FrameWriter {
            to,
            codec,
            frame_limit,
            entries: Vec::new(),
            encoded: FileOffset(0),
            decoded: FileOffset(0),
            zeros: ByteLen(0),
        }
    }

    /// How many bytes the frames so far decode to: where the next one begins.
    #[must_use]
    pub fn position(&self) -> FileOffset {
        self.decoded
    }

    /// How many bytes were written so far.
    #[must_use]
    pub fn written(&self) -> ByteLen {
        ByteLen(self.encoded.0)
    }

    /// Appends a frame of the same codec.
    ///
    /// # Errors
    /// If it holds more than a frame of this file may, there are too many, or it can't be written.
    pub fn push(&mut self, frame: &Encoded) -> Result<(), EncodeError> {
        if frame.decoded_len() > self.frame_limit {
            return Err(EncodeError::Length { length: frame.decoded_len(), limit: self.frame_limit });
        }
        self.check_room()?;
        self.to.write_all(frame.bytes()).map_err(|error| self.failed(error))?;
        self.add(ByteLen::of(frame.bytes().len()), frame.decoded_len(), frame.digest())
    }

    /// Appends `length` zero bytes.
    ///
    /// # Errors
    /// If there are too many frames, or they can't be written.
    pub fn push_zeros(&mut self, length: ByteLen) -> Result<(), EncodeError> {
        let mut left = length;
        while left > ByteLen(0) {
            let now = left.min(MAX_ZEROS);
            left = left - now;
            self.check_room()?;
            let encoded = zeros::write(self.codec, now.0, &mut self.to).map_err(|error| self.failed(error))?;
            self.add(ByteLen(encoded), now, Digest::ZEROS)?;
            self.zeros += now;
        }
        Ok(())
    }

    /// Appends the index and the seek table, and returns what was written to.
    ///
    /// # Errors
    /// If they can't be written.
    pub fn finish(mut self) -> Result<(W, Summary), EncodeError> {
        let limit = u32::try_from(self.frame_limit.0).unwrap_or(u32::MAX);
        let (index, root) = tree::build(&self.entries, self.codec, limit)?;
        self.to.write_all(&index).and_then(|()| self.to.flush()).map_err(|error| self.failed(error))?;
        let index = ByteLen::of(index.len());
        let summary = Summary {
            root,
            frames: self.entries.len() as u64,
            decoded: ByteLen(self.decoded.0),
            zeros: self.zeros,
            encoded: ByteLen(self.encoded.0 + index.0),
            index,
        };
        Ok((self.to, summary))
    }

    fn check_room(&self) -> Result<(), EncodeError> {
        if (self.entries.len() as u64) < MAX_FRAMES { Ok(()) } else { Err(EncodeError::TooMany { limit: MAX_FRAMES }) }
    }

    fn add(&mut self, encoded: ByteLen, decoded: ByteLen, digest: Digest) -> Result<(), EncodeError> {
        let field =
            |length: ByteLen| u32::try_from(length.0).map_err(|_| EncodeError::Length { length, limit: MAX_ZEROS });
        self.entries.push(Entry { encoded: field(encoded)?, decoded: field(decoded)?, digest });
        self.encoded += encoded;
        self.decoded += decoded;
        Ok(())
    }

    fn failed(&self, error: io::Error) -> EncodeError {
        EncodeError::Write { at: self.encoded, error }
    }
}
