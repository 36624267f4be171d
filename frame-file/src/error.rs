//! What can go wrong, one enum for each stage.

use std::io;

use page_units::{ByteLen, FileOffset};

/// Why a frame can't be made, or a file can't be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The codec could not compress.
    #[error("compressing {length} bytes failed: {reason}")]
    Codec {
        /// How many bytes there were.
        length: ByteLen,
        /// What the codec said.
        reason: String,
    },
    /// A frame is empty, or longer than a frame may be.
    #[error("a frame of {length} bytes: it must hold 1 to {limit} bytes")]
    Length {
        /// How many bytes there were.
        length: ByteLen,
        /// The most that a frame may hold.
        limit: ByteLen,
    },
    /// There are more frames than the format can hold.
    #[error("more than {limit} frames: use larger frames")]
    TooMany {
        /// The most frames that a file may have.
        limit: u64,
    },
    /// What is to be compressed can't be read.
    #[error("reading the input at offset {at} failed: {error}")]
    Input {
        /// Where in the input.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// Writing failed.
    #[error("writing at offset {at} failed: {error}")]
    Write {
        /// Where in the compressed file.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// Why a file can't be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Reading failed.
    #[error("reading at offset {at} failed: {error}")]
    Read {
        /// Where in the compressed file.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The file does not end with a seek table.
    #[error("it does not end with a seek table: it is no seekable file, or was cut off")]
    NoSeekTable,
    /// There is a seek table, but no index of ours before it.
    #[error("it has a seek table but no index of digests: another program made it")]
    NoIndex,
    /// The index contradicts itself or the file.
    #[error("the index is corrupt at offset {at}: {what}")]
    Corrupt {
        /// Where in the compressed file.
        at: FileOffset,
        /// What is wrong.
        what: &'static str,
    },
}

/// Why bytes can't be read from an open file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// Reading failed.
    #[error("reading at offset {at} failed: {error}")]
    Read {
        /// Where in the compressed file.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// A piece of the index or seek table contradicts its digest, or its neighbours.
    #[error("the index is corrupt at offset {at}: {what}")]
    Index {
        /// Where in the compressed file.
        at: FileOffset,
        /// What is wrong.
        what: &'static str,
    },
    /// A frame contradicts its digest, or does not decode to what the index promises.
    #[error("frame {frame} at offset {at} is corrupt: {what}")]
    Frame {
        /// The number of the frame.
        frame: u64,
        /// Where in the compressed file.
        at: FileOffset,
        /// What is wrong.
        what: &'static str,
    },
    /// The bytes lie behind the end of the decoded content.
    #[error("the content ends at {end}, and was asked for up to {asked}")]
    BeyondEnd {
        /// Where the decoded content ends.
        end: FileOffset,
        /// The end of what was asked for.
        asked: FileOffset,
    },
}
