//! Why a stream can't be read.

use std::io;

use page_units::{ByteLen, FileOffset};

/// Why a migration stream can't be read. Every offset is a position in the file (or in what came over the socket).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The system could not read.
    #[error("reading at offset {at} failed: {error}")]
    Io {
        /// Where.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The stream ends where more has to come.
    #[error("the stream ends at offset {at}, inside {what}")]
    Truncated {
        /// Where something was to be read that is not there.
        at: FileOffset,
        /// What is incomplete.
        what: &'static str,
    },
    /// It does not begin with QEMU's magic number.
    #[error("not a QEMU migration stream: no \"QEVM\" at offset {at}")]
    NoMagic {
        /// Where it should be.
        at: FileOffset,
    },
    /// A version of the stream other than 3.
    #[error("at offset {at}: version {version} of the migration stream, only version 3 is known")]
    Version {
        /// Where the version is.
        at: FileOffset,
        /// The version.
        version: u32,
    },
    /// Something that no QEMU writes.
    #[error("at offset {at}: {what}")]
    Invalid {
        /// Where.
        at: FileOffset,
        /// What is wrong.
        what: String,
    },
    /// A section does not end with its own footer.
    #[error("at offset {at}: section {id} (\"{name}\") should end here with its footer, found {found}")]
    Footer {
        /// Where the footer should be.
        at: FileOffset,
        /// The section.
        id: u32,
        /// Its name.
        name: String,
        /// What is there instead.
        found: String,
    },
    /// A length that is larger than anything real.
    #[error("at offset {at}: {what} of {length} bytes, more than the limit of {limit}")]
    TooLong {
        /// Where the length is.
        at: FileOffset,
        /// What it is the length of.
        what: &'static str,
        /// The length.
        length: ByteLen,
        /// The limit.
        limit: ByteLen,
    },
}

/// Why something can't be written to a stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The system could not write.
    #[error("writing the stream failed: {0}")]
    Io(#[from] io::Error),
    /// A name longer than the 255 bytes that a counted string can hold.
    #[error("the name \"{name}\" is {} bytes long, the stream takes at most 255", name.len())]
    NameTooLong {
        /// The name.
        name: String,
    },
    /// More bytes than the stream's length field can tell.
    #[error("{what} of {length} bytes is too long for the stream")]
    TooLong {
        /// What.
        what: &'static str,
        /// Its length.
        length: ByteLen,
    },
}
