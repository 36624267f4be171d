//! The bytes of a snapshot: those of a plain file, or what the frames of a compressed one decode to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use frame_file::{FrameFile, ReadError};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use page_units::FileOffset;

use crate::OpenErrorKind;

/// An open file. All offsets are those of the snapshot, whether it is compressed or not.
#[derive(Debug)]
pub(crate) enum Bytes {
    Plain {
        file: File,
        /// Its length when it was opened.
        size: u64,
    },
    Frames(Box<FrameFile>),
}

impl Bytes {
    /// Looks how the file ends: that of frames ends with an index.
    pub(crate) fn new(file: File, size: u64) -> Result<Bytes, OpenErrorKind> {
        if FrameFile::is_frame_file(&file)? {
            let frames = FrameFile::open(file).map_err(|error| OpenErrorKind::Frames { what: error.to_string() })?;
            return Ok(Bytes::Frames(Box::new(frames)));
        }
        Ok(Bytes::Plain { file, size })
    }

    /// The file as it lies on the disk.
    pub(crate) fn file(&self) -> &File {
        match self {
            Bytes::Plain { file, .. } => file,
            Bytes::Frames(frames) => frames.file(),
        }
    }

    pub(crate) fn frames(&self) -> Option<&FrameFile> {
        match self {
            Bytes::Plain { .. } => None,
            Bytes::Frames(frames) => Some(frames),
        }
    }

    /// How long the snapshot is.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Bytes::Plain { size, .. } => *size,
            Bytes::Frames(frames) => frames.len().0,
        }
    }

    /// Reads a part of the snapshot.
    pub(crate) fn read_exact_at(&self, to: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Bytes::Plain { file, .. } => file.read_exact_at(to, at),
            Bytes::Frames(frames) => frames.read_exact_at(to, FileOffset(at)).map_err(from_frames),
        }
    }

    /// Where data begins that is no hole, and stands in no frame of zeros.
    pub(crate) fn data_from(&self, offset: FileOffset) -> io::Result<Option<FileOffset>> {
        match self {
            // This moves the position of the file, which nothing here ever uses.
            Bytes::Plain { file, .. } => {
                match lseek(file, i64::try_from(offset.0).unwrap_or(i64::MAX), Whence::SeekData) {
                    Ok(data) => Ok(Some(FileOffset(data.cast_unsigned()))),
                    Err(Errno::ENXIO) => Ok(None),
                    Err(_) => Ok(Some(offset)),
                }
            }
            Bytes::Frames(frames) => {
                let mut at = offset;
                while at.0 < frames.len().0 {
                    let frame = frames.frame_at(at).map_err(from_frames)?;
                    if !frame.is_zero() {
                        return Ok(Some(at));
                    }
                    at = frame.decoded().end;
                }
                Ok(None)
            }
        }
    }

    /// Reads as much of a part as there is.
    pub(crate) fn read_at(&self, to: &mut [u8], at: u64) -> io::Result<usize> {
        match self {
            Bytes::Plain { file, .. } => file.read_at(to, at),
            Bytes::Frames(_) => {
                let left = usize::try_from(self.size().saturating_sub(at)).unwrap_or(usize::MAX);
                let length = to.len().min(left);
                self.read_exact_at(&mut to[..length], at)?;
                Ok(length)
            }
        }
    }
}

fn from_frames(error: ReadError) -> io::Error {
    let kind = match &error {
        ReadError::Read { error, .. } => error.kind(),
        ReadError::BeyondEnd { .. } => io::ErrorKind::UnexpectedEof,
        _ => io::ErrorKind::InvalidData,
    };
    io::Error::new(kind, error)
}
