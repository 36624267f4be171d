//! The list of RAM blocks at the beginning of the RAM section.

use std::io::{Read, Seek};

use page_units::{ByteLen, FileOffset, GuestAddr, PAGE_SIZE, PageSize, RamBlock};
use vmstate::StreamReader;

use crate::OpenErrorKind;
use crate::header::{BlockHeader, HEADER_VERSION, bitmap_len};

/// The most RAM that is believed: 64 TiB.
const MAX_RAM: ByteLen = ByteLen(64 << 40);

/// Where a RAM block is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockFile {
    /// Where its header is.
    pub header_offset: FileOffset,
    /// Where its bitmap is.
    pub bitmap_offset: FileOffset,
    /// Length of the bitmap: a multiple of 8 bytes.
    pub bitmap_len: ByteLen,
    /// Where its first page is.
    pub pages_offset: FileOffset,
    /// Its guest-physical address, where the file tells (with x-ignore-shared).
    pub guest_address: Option<GuestAddr>,
    /// Whether the file has its pages. With x-ignore-shared, memory that is shared is left out.
    pub in_file: bool,
}

/// A block and where it is.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) ram: RamBlock,
    pub(crate) file: BlockFile,
}

/// A part of the file that belongs to a block: its first byte, the byte after its last, and the number of the block.
pub(crate) type Area = (FileOffset, FileOffset, usize);

/// How a list of blocks is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    /// With x-ignore-shared each block's guest-physical address is listed.
    pub(crate) addresses: bool,
    /// The end of the file.
    pub(crate) size: FileOffset,
}

/// Refuses a total that no guest has.
pub(crate) fn check_total(at: FileOffset, total: ByteLen) -> Result<(), OpenErrorKind> {
    if total <= MAX_RAM {
        return Ok(());
    }
    Err(OpenErrorKind::TooLarge { at, what: "the RAM blocks together", length: total, limit: MAX_RAM })
}

impl Format {
    /// Reads one entry of the list; `None` if the list has ended.
    pub(crate) fn read<R: Read + Seek>(self, from: &mut StreamReader<R>) -> Result<Option<Block>, OpenErrorKind> {
        let name = from.counted_string()?;
        if name.is_empty() {
            return Ok(None);
        }
        let length = ByteLen(from.u64()?);
        let guest_address = if self.addresses { Some(GuestAddr(from.u64()?)) } else { None };
        let header_offset = from.position();
        let invalid = |what: String| OpenErrorKind::Block { block: name.clone(), at: header_offset, what };
        if length.0 == 0 {
            return Err(invalid("it is empty".to_owned()));
        }
        let ram = RamBlock::new(name.clone(), length, PageSize::SMALL).map_err(|error| invalid(error.to_string()))?;
        let header = BlockHeader::read(from)?;
        if header.version != HEADER_VERSION {
            return Err(invalid(format!("version {} of the header, only version 1 is known", header.version)));
        }
        if header.page_size.0 != PAGE_SIZE {
            return Err(invalid(format!("pages of {} bytes, only {PAGE_SIZE} are supported", header.page_size)));
        }
        let in_file = !(self.addresses && header.bitmap_offset.0 == 0 && header.pages_offset.0 == 0);
        let bitmap_len = if in_file { bitmap_len(ram.pages()) } else { ByteLen(0) };
        let file = BlockFile {
            header_offset,
            bitmap_offset: header.bitmap_offset,
            bitmap_len,
            pages_offset: header.pages_offset,
            guest_address,
            in_file,
        };
        if !in_file {
            return Ok(Some(Block { ram, file }));
        }
        let (bitmap, pages) = (header.bitmap_offset, header.pages_offset);
        if bitmap.checked_add(bitmap_len).is_none_or(|end| end > self.size) {
            let size = self.size;
            return Err(invalid(format!(
                "its bitmap ({bitmap_len} bytes at {bitmap}) is not in the file, which ends at {size}"
            )));
        }
        if !pages.0.is_multiple_of(PAGE_SIZE) {
            return Err(invalid(format!("its pages begin at {pages}, which is not a multiple of {PAGE_SIZE}")));
        }
        // What QEMU's loader reads next is behind the pages; before them there is only what was read.
        if pages < from.position() {
            return Err(invalid(format!("its pages begin at {pages}, before its own header ends")));
        }
        if pages.checked_add(length).is_none() {
            return Err(invalid(format!("its pages ({length} bytes at {pages}) end beyond any file")));
        }
        Ok(Some(Block { ram, file }))
    }
}

impl Block {
    /// Where its pages end; where the list goes on.
    pub(crate) fn pages_end(&self) -> FileOffset {
        FileOffset(self.file.pages_offset.0.saturating_add(self.ram.length().0))
    }

    /// The bitmap and the pages, of the block with this number.
    pub(crate) fn areas(&self, number: usize) -> [Area; 2] {
        let file = &self.file;
        let bitmap_end = FileOffset(file.bitmap_offset.0.saturating_add(file.bitmap_len.0));
        [(file.bitmap_offset, bitmap_end, number), (file.pages_offset, self.pages_end(), number)]
    }
}

/// The first two areas that share bytes, and where.
pub(crate) fn overlap(blocks: &[Block]) -> Option<(&Block, &Block, FileOffset)> {
    let in_file = blocks.iter().enumerate().filter(|(_, block)| block.file.in_file);
    let mut areas: Vec<Area> = in_file.flat_map(|(number, block)| block.areas(number)).collect();
    areas.sort_unstable();
    let pair = areas.windows(2).find(|pair| pair[0].1 > pair[1].0)?;
    Some((&blocks[pair[0].2], &blocks[pair[1].2], pair[1].0))
}
