//! Why a stream can't be taken.

use page_source::{SinkError, SourceErrorKind};
use page_units::{ByteLen, FileOffset, LayoutError};
use vmstate::{DescError, StreamError, WalkError};

/// Why a stream can't be taken. Offsets are those of the stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// It is not well-formed, or could not be read.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// It is a stream of another kind.
    #[error("at offset {at}: {what}")]
    Foreign {
        /// Where.
        at: FileOffset,
        /// What it has that can't be taken.
        what: String,
    },
    /// It announces more RAM than there can be.
    #[error("at offset {at}: {total} bytes of RAM are announced, but the guest has at most {limit}")]
    TooMuchRam {
        /// Where.
        at: FileOffset,
        /// What is announced.
        total: ByteLen,
        /// What was expected at most.
        limit: ByteLen,
    },
    /// The RAM blocks contradict each other.
    #[error("the list of RAM blocks that ends at offset {at}: {error}")]
    Layout {
        /// Where.
        at: FileOffset,
        /// How.
        #[source]
        error: LayoutError,
    },
    /// A page that no block has.
    #[error("at offset {at}: RAM block \"{block}\" has no page at {page}")]
    NoSuchPage {
        /// Where.
        at: FileOffset,
        /// The block.
        block: String,
        /// The offset of the page in the block.
        page: ByteLen,
    },
    /// A page for the second time: only one of its contents can be that of the freeze point.
    #[error("at offset {at}: the page at {page} of RAM block \"{block}\" comes for the second time")]
    PageTwice {
        /// Where.
        at: FileOffset,
        /// The block.
        block: String,
        /// The offset of the page in the block.
        page: ByteLen,
    },
    /// There is no description of the device state: nothing tells whether it is complete.
    #[error(
        "the stream ends at offset {at} without a description of its device state: it was cut off, or the machine has suppress-vmdesc on"
    )]
    NoDescription {
        /// The end of the stream.
        at: FileOffset,
    },
    /// The description of the device state can't be read.
    #[error("{error} (the description begins at offset {at})")]
    Description {
        /// Where its text begins.
        at: FileOffset,
        /// What is wrong, by its position in the text.
        #[source]
        error: DescError,
    },
    /// The device state is not what its description says.
    #[error("device \"{device}\": {error}")]
    Device {
        /// The name of its section.
        device: String,
        /// What is wrong.
        #[source]
        error: WalkError,
    },
    /// The sink takes no more.
    #[error(transparent)]
    Sink(SinkError),
}

impl ReadError {
    /// The same as the error of a source.
    pub(super) fn kind(&self) -> SourceErrorKind {
        match self {
            ReadError::Stream(StreamError::Io { .. } | StreamError::Truncated { .. }) => SourceErrorKind::PeerGone,
            ReadError::NoDescription { .. } => SourceErrorKind::Truncated,
            ReadError::Sink(_) => SourceErrorKind::Stopped,
            _ => SourceErrorKind::Protocol,
        }
    }
}
