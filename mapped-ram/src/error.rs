//! Why a snapshot file can't be opened, read or written. Each message is one line that names the file.

use std::io;
use std::path::PathBuf;

use page_units::{BlockId, ByteLen, FileOffset, LayoutError, PageIndex};
use vmstate::{DescError, StreamError, WriteError};
use whole_file::WholeFileError;

/// Why a file can't be opened as a snapshot.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", path.display())]
pub struct OpenError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub kind: OpenErrorKind,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenErrorKind {
    /// The system refused.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It ends as a compressed snapshot does, but its index is damaged.
    #[error("a compressed snapshot, but {what}")]
    Frames {
        /// What is wrong with it.
        what: String,
    },
    /// Only regular files have pages at fixed offsets.
    #[error("not a regular file")]
    NotAFile,
    /// No migration stream begins here, or anywhere near the beginning.
    #[error(
        "not a QEMU migration stream (no \"QEVM\" at offset {base}{})",
        if *searched { ", nor farther on in the first MiB" } else { "" }
    )]
    NotAStream {
        /// Where it should begin.
        base: FileOffset,
        /// Whether it was looked for behind that: not where the place was given.
        searched: bool,
    },
    /// A migration stream of the other kind.
    #[error(
        "a plain migration stream (machine type {machine}), not a mapped-ram file: its pages are not at fixed offsets; \
         save with the capability mapped-ram"
    )]
    PlainStream {
        /// The machine type.
        machine: String,
    },
    /// The stream is not what QEMU writes.
    #[error("{0}")]
    Stream(#[from] StreamError),
    /// The description of the device state is not what QEMU writes.
    #[error("{error} (the description begins at offset {at})")]
    Description {
        /// Where its text begins.
        at: FileOffset,
        /// What is wrong, by its position in the text.
        #[source]
        error: DescError,
    },
    /// The RAM blocks can't be.
    #[error("{0}")]
    Layout(#[from] LayoutError),
    /// A RAM block's header can't be right.
    #[error("RAM block \"{block}\" (header at offset {at}): {what}")]
    Block {
        /// The block.
        block: String,
        /// Where its header is.
        at: FileOffset,
        /// What is wrong.
        what: String,
    },
    /// The list of blocks does not end where its length says.
    #[error("at offset {at}: lengths disagree: the RAM section announces {total} bytes, its blocks have {sum}")]
    RamLength {
        /// Where.
        at: FileOffset,
        /// What it says.
        total: ByteLen,
        /// What the blocks have.
        sum: ByteLen,
    },
    /// The file ends before a RAM block's pages do.
    #[error(
        "RAM block \"{block}\" needs the file up to offset {needed}, but it ends at {actual}: it was truncated or is \
         still being written"
    )]
    Truncated {
        /// The block.
        block: String,
        /// Where its pages end.
        needed: FileOffset,
        /// Where the file ends.
        actual: FileOffset,
    },
    /// There is no RAM in it.
    #[error("the stream has no \"ram\" section")]
    NoRam,
    /// The device state is not described, so that nothing tells whether it is all there.
    #[error(
        "the file ends at offset {size} without the description of its device state: it was truncated, is still being \
         written, or was saved by a machine type with suppress-vmdesc"
    )]
    NoDescription {
        /// Where the file ends.
        size: FileOffset,
    },
    /// A section whose length nothing tells.
    #[error("at offset {at}: the length of section \"{name}\" is not known: no description of the device state has it")]
    UnknownSection {
        /// Where.
        at: FileOffset,
        /// Its name.
        name: String,
    },
    /// More than anything real has.
    #[error("at offset {at}: {what}: {length} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Where.
        at: FileOffset,
        /// What.
        what: &'static str,
        /// How long it is.
        length: ByteLen,
        /// How long it may be.
        limit: ByteLen,
    },
}

/// Why a page can't be looked up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// The system could not read.
    #[error("{}: reading the bitmap of RAM block \"{block}\" at offset {at} failed: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The block.
        block: String,
        /// Where.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The bitmap has bits for pages that the block does not have.
    #[error(
        "{}: the bitmap of RAM block \"{block}\" at offset {at} has bits beyond the block's last page", path.display()
    )]
    BeyondBlock {
        /// The file.
        path: PathBuf,
        /// The block.
        block: String,
        /// Where the wrong byte is.
        at: FileOffset,
    },
    /// The file is not what it was when it was opened: nothing of it that was not read before is trusted.
    #[error("{}: the file has changed while it was in use: {what}; seen at the bitmap of RAM block \"{block}\"", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// The block.
        block: String,
        /// What about it.
        what: &'static str,
    },
    /// The file ends before a page that it should have.
    #[error(
        "{}: RAM block \"{block}\" needs the file up to offset {needed}, but it ends at {actual}: it was truncated",
        path.display()
    )]
    BeyondFile {
        /// The file.
        path: PathBuf,
        /// The block.
        block: String,
        /// Where the last stored page ends.
        needed: FileOffset,
        /// Where the file ends.
        actual: FileOffset,
    },
    /// The block's content was left out of the file, since it is in memory that the guests share.
    #[error("{}: the content of RAM block \"{block}\" is not in the file (x-ignore-shared)", path.display())]
    NotInFile {
        /// The file.
        path: PathBuf,
        /// The block.
        block: String,
    },
    /// The bitmaps were never written: no page can be told from a zero page.
    #[error(
        "{}: the bitmaps are all zero and the RAM section never ended: QEMU does so with background-snapshot and \
         mapped-ram; `fastload repair` can rebuild them",
        path.display()
    )]
    NoBitmaps {
        /// The file.
        path: PathBuf,
    },
    /// There is no such page.
    #[error("{}: RAM block number {} has no page {page}", path.display(), block.0)]
    NoSuchPage {
        /// The file.
        path: PathBuf,
        /// The block's number.
        block: BlockId,
        /// The page.
        page: PageIndex,
    },
}

/// Why a snapshot can't be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The system refused.
    #[error("{}: {what}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// Writing failed.
    #[error("{}: {what} at offset {at} failed: {error}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What was being written.
        what: &'static str,
        /// Where.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// The file can't be made, or not be given its name.
    #[error(transparent)]
    File(#[from] WholeFileError),
    /// A name is too long for the stream.
    #[error("{}: {error}", path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Which one.
        #[source]
        error: WriteError,
    },
    /// The layout is too large for a file.
    #[error("{}: the RAM blocks do not fit into a file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// What was written can't be read: the device state is not what it should be.
    #[error("the snapshot would not be readable and was not published: {0}")]
    Unreadable(#[source] OpenError),
    /// It was published, or given up, before.
    #[error("{}: the snapshot is already finished", path.display())]
    Finished {
        /// The file.
        path: PathBuf,
    },
}
