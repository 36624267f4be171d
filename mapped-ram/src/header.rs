//! The header of a RAM block in the file (QEMU `docs/devel/migration/mapped-ram.rst`).

use std::io::Read;

use page_units::{ByteLen, FileOffset, PAGE_SIZE, PageCount};
use vmstate::{StreamError, StreamReader};

/// Page areas begin at a multiple of this, for direct I/O.
pub(crate) const PAGES_ALIGNMENT: u64 = 1 << 20;
/// The only version there is.
pub(crate) const HEADER_VERSION: u32 = 1;
/// Its length in the file.
pub(crate) const HEADER_LEN: u64 = 28;

/// 28 bytes, big-endian: u32 version, u64 page size, u64 offset of the bitmap, u64 offset of the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockHeader {
    pub(crate) version: u32,
    pub(crate) page_size: ByteLen,
    pub(crate) bitmap_offset: FileOffset,
    pub(crate) pages_offset: FileOffset,
}

impl BlockHeader {
    /// The header that QEMU would write at `at`: bitmap right behind it, then the pages.
    pub(crate) fn at(at: FileOffset, pages: PageCount) -> Option<BlockHeader> {
        let bitmap_offset = at.checked_add(ByteLen(HEADER_LEN))?;
        let end = bitmap_offset.checked_add(bitmap_len(pages))?;
        let pages_offset = FileOffset(end.0.checked_next_multiple_of(PAGES_ALIGNMENT)?);
        Some(BlockHeader { version: HEADER_VERSION, page_size: ByteLen(PAGE_SIZE), bitmap_offset, pages_offset })
    }

    pub(crate) fn read<R: Read>(from: &mut StreamReader<R>) -> Result<BlockHeader, StreamError> {
        Ok(BlockHeader {
            version: from.u32()?,
            page_size: ByteLen(from.u64()?),
            bitmap_offset: FileOffset(from.u64()?),
            pages_offset: FileOffset(from.u64()?),
        })
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.version.to_be_bytes().to_vec();
        for word in [self.page_size.0, self.bitmap_offset.0, self.pages_offset.0] {
            bytes.extend_from_slice(&word.to_be_bytes());
        }
        bytes
    }
}

/// The length of a bitmap for that many pages: whole words of 64 bits.
pub(crate) fn bitmap_len(pages: PageCount) -> ByteLen {
    ByteLen(pages.0.div_ceil(64).saturating_mul(8))
}
