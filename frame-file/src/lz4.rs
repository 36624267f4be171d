//! Decoding LZ4 frames of the kind that [`Encoder`](crate::Encoder) makes: independent blocks, the length of the
//! content, no checksums, no dictionary (`lz4_Frame_format.md` in LZ4's sources). The digest was checked before.

use crate::format::{u32_at, u64_at};

const MAGIC: u32 = 0x184D_2204;
/// Version 1, independent blocks, content size.
const FLAGS: u8 = 0b0110_1000;
/// Magic number, flags, block size, content size, checksum of the header.
const HEADER: usize = 15;
/// Marks a block that is not compressed.
const PLAIN: u32 = 1 << 31;

/// Decodes `frame` into exactly `to`.
pub(crate) fn decode(frame: &[u8], to: &mut [u8]) -> Result<(), &'static str> {
    if frame.len() < HEADER || u32_at(frame, 0) != MAGIC || frame[4] != FLAGS {
        return Err("it is no LZ4 frame of the expected kind");
    }
    if u64_at(frame, 6) != to.len() as u64 {
        return Err("it has another length than the index says");
    }
    let mut rest = &frame[HEADER..];
    let mut done = 0;
    loop {
        let (size, after) = rest.split_first_chunk::<4>().ok_or("it is cut off")?;
        let size = u32::from_le_bytes(*size);
        if size == 0 {
            return if done == to.len() && after.is_empty() { Ok(()) } else { Err("it ends at the wrong place") };
        }
        let len = usize::try_from(size & !PLAIN).map_err(|_| "it is cut off")?;
        let (block, after) = after.split_at_checked(len).ok_or("it is cut off")?;
        let place = &mut to[done..];
        done += if size & PLAIN == 0 {
            lz4_flex::block::decompress_into(block, place).map_err(|_| "a block can't be decoded")?
        } else {
            place.get_mut(..len).ok_or("a block is too long")?.copy_from_slice(block);
            len
        };
        rest = after;
    }
}
