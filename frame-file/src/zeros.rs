//! Frames that stand for a run of zero bytes. They are decoded by other programs only: a reader of ours knows from the
//! index that they are zero.

use std::io::{self, Write};

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};

use crate::Codec;

/// The largest block of zeros in a zstd frame: the format's limit (RFC 8878, 3.1.1.2.4).
const ZSTD_BLOCK: u64 = 128 << 10;

/// Writes one frame that decodes to `length` zero bytes.
pub(crate) fn write(codec: Codec, length: u64, to: &mut impl Write) -> io::Result<u64> {
    match codec {
        Codec::Zstd { .. } => zstd(length, to),
        Codec::Lz4 => lz4(length, to),
    }
}

/// A frame of RLE blocks, four bytes for 128 KiB. Returns its length.
fn zstd(length: u64, to: &mut impl Write) -> io::Result<u64> {
    // Magic number; content size in 8 bytes, no checksum, no dictionary; a window of 128 KiB.
    let mut frame = vec![0x28, 0xB5, 0x2F, 0xFD, 0b1100_0000, 7 << 3];
    frame.extend_from_slice(&length.to_le_bytes());
    let mut left = length;
    while left > 0 {
        let now = left.min(ZSTD_BLOCK);
        left -= now;
        let header = (now << 3) | (1 << 1) | u64::from(left == 0);
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    to.write_all(&frame)?;
    Ok(frame.len() as u64)
}

/// A frame whose blocks are as large as the format allows: one byte for 255. Returns its length.
fn lz4(length: u64, to: &mut impl Write) -> io::Result<u64> {
    let info =
        FrameInfo::new().block_mode(BlockMode::Independent).block_size(BlockSize::Max4MB).content_size(Some(length));
    let mut counted = Counted { to, bytes: 0 };
    let mut encoder = FrameEncoder::with_frame_info(info, &mut counted);
    io::copy(&mut io::Read::take(io::repeat(0), length), &mut encoder)?;
    encoder.finish()?;
    Ok(counted.bytes)
}

struct Counted<W> {
    to: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.write(bytes)?;
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}
