//! What is to be compressed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use page_units::{ByteLen, FileOffset};

/// Bytes that can be read at any place, from several threads.
pub trait Input: Sync {
    /// Fills `to` with the bytes from `offset` on.
    ///
    /// # Errors
    /// If they can't be read, or end before.
    fn read_into(&self, to: &mut [u8], offset: FileOffset) -> io::Result<()>;

    /// How many bytes from `offset` on are known to be zero without reading them. An answer of 0 is always right.
    ///
    /// # Errors
    /// If the system can't tell.
    fn zeros_at(&self, offset: FileOffset) -> io::Result<ByteLen>;
}

impl Input for File {
    fn read_into(&self, to: &mut [u8], offset: FileOffset) -> io::Result<()> {
        FileExt::read_exact_at(self, to, offset.0)
    }

    /// Holes, as `lseek(2)` with `SEEK_DATA` tells of them. A hole that reaches the end of the file has no data behind
    /// it (`ENXIO`): its length then follows from the size.
    fn zeros_at(&self, offset: FileOffset) -> io::Result<ByteLen> {
        let at = i64::try_from(offset.0).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let data = match nix::unistd::lseek(self, at, nix::unistd::Whence::SeekData) {
            Ok(data) => data.cast_unsigned(),
            Err(nix::errno::Errno::ENXIO) => self.metadata()?.len(),
            // A file system, or a device, that knows nothing of holes.
            Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EOPNOTSUPP) => return Ok(ByteLen(0)),
            Err(error) => return Err(error.into()),
        };
        Ok(ByteLen(data.saturating_sub(offset.0)))
    }
}

/// Where an input is cut into frames.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Cuts {
    length: ByteLen,
    frame: ByteLen,
    /// Sorted; a frame begins at each.
    starts: Vec<FileOffset>,
}

impl Cuts {
    /// Cuts `length` bytes every `frame` bytes.
    ///
    /// # Panics
    /// If `frame` is 0.
    #[must_use]
    pub fn every(frame: ByteLen, length: ByteLen) -> Cuts {
        assert!(frame > ByteLen(0), "a frame holds at least one byte");
        Cuts { length, frame, starts: Vec::new() }
    }

    /// Makes a frame begin at each of `starts`, too; the next ones are counted from there.
    #[must_use]
    pub fn with_starts(mut self, starts: impl IntoIterator<Item = FileOffset>) -> Cuts {
        self.starts.extend(starts);
        self.starts.sort_unstable();
        self.starts.dedup();
        self
    }

    pub(crate) fn length(&self) -> ByteLen {
        self.length
    }

    /// The cut at or before `offset`, and the next one after it.
    pub(crate) fn around(&self, offset: FileOffset) -> (FileOffset, FileOffset) {
        let next = self.starts.partition_point(|start| *start <= offset);
        let base = next.checked_sub(1).map_or(FileOffset(0), |last| self.starts[last]);
        let limit = self.starts.get(next).copied().unwrap_or(FileOffset(self.length.0)).min(FileOffset(self.length.0));
        let before = offset.0 - (offset.0 - base.0) % self.frame.0;
        (FileOffset(before), FileOffset(before.saturating_add(self.frame.0)).min(limit))
    }
}
