//! What is odd about a file that can be read nevertheless.

use std::fmt;

use page_units::{ByteLen, FileOffset};

/// Something odd about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// All bitmaps are zero although there is page data: what QEMU writes with background-snapshot and mapped-ram.
    BitmapsAllZero {
        /// A block that has data.
        block: String,
        /// Where the first data that is not zero is.
        data_at: FileOffset,
    },
    /// The RAM section never ended and no page is stored: the bitmaps were not written.
    BitmapsNotWritten,
    /// The file ends before the pages of a block do.
    TruncatedPages {
        /// The block.
        block: String,
        /// Where its pages end.
        needed: FileOffset,
        /// Where the file ends.
        actual: FileOffset,
    },
    /// The blocks are not as long as the list says.
    RamLengthDisagrees {
        /// The block that is too long, or what is there instead of one.
        at: FileOffset,
        /// What the list says.
        total: ByteLen,
        /// The sum of the blocks.
        sum: ByteLen,
    },
    /// The stream ends before the file does.
    TrailingBytes {
        /// Where the stream ends.
        at: FileOffset,
        /// How many bytes follow.
        length: ByteLen,
    },
    /// Two areas of the file share bytes.
    Overlap {
        /// One block.
        block: String,
        /// The other, or the same if its own bitmap and pages overlap.
        other: String,
        /// Where they meet.
        at: FileOffset,
    },
    /// The bitmap of a block can't be used.
    Bitmap {
        /// Why.
        what: String,
    },
    /// The devices' state is not described: its sections can't be told apart, and nothing tells whether it is complete.
    NoDescription,
    /// The stream can't be read to its end.
    Incomplete {
        /// Why.
        what: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::BitmapsAllZero { block, data_at } => write!(
                f,
                "all bitmaps are zero although there is page data (RAM block \"{block}\", offset {data_at}): QEMU's \
                 background-snapshot with mapped-ram writes such files; a guest loaded from it would find its memory \
                 empty; repair it with `fastload repair`"
            ),
            Warning::BitmapsNotWritten => {
                f.write_str("the RAM section never ended and all bitmaps are zero: they were not written")
            }
            Warning::TruncatedPages { block, needed, actual } => write!(
                f,
                "truncated page area: RAM block \"{block}\" needs the file up to offset {needed}, but it ends at {actual}"
            ),
            Warning::RamLengthDisagrees { at, total, sum } => write!(
                f,
                "at offset {at}: lengths disagree: the RAM section announces {total} bytes, its blocks have {sum}"
            ),
            Warning::TrailingBytes { at, length } => {
                write!(
                    f,
                    "lengths disagree: the stream ends at offset {at}, but {length} more bytes follow in the file"
                )
            }
            Warning::Overlap { block, other, at } => {
                write!(f, "areas of the RAM blocks \"{block}\" and \"{other}\" overlap at offset {at}")
            }
            Warning::Bitmap { what } => f.write_str(what),
            Warning::NoDescription => f.write_str(
                "the device state has no description, so that nothing tells whether it is all there: the file was \
                     truncated, is still being written, or was saved by a machine type with suppress-vmdesc",
            ),
            Warning::Incomplete { what } => write!(f, "the file can't be read to its end: {what}"),
        }
    }
}
