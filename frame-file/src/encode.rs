//! Bytes to frames.

use std::fmt;
use std::io::Write;

use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
use page_units::ByteLen;
use zstd_safe::{CCtx, CParameter, ResetDirective};

use crate::format::MAX_FRAME;
use crate::{Codec, Digest, EncodeError};

/// A finished frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    bytes: Vec<u8>,
    decoded: ByteLen,
    digest: Digest,
}

impl Encoded {
    /// The frame as it stands in the file.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many bytes it decodes to.
    #[must_use]
    pub fn decoded_len(&self) -> ByteLen {
        self.decoded
    }

    /// The digest of [`bytes`](Encoded::bytes).
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }
}

/// Compresses, one frame at a time. Each thread has its own.
pub struct Encoder {
    codec: Codec,
    zstd: Option<CCtx<'static>>,
    buffer: Vec<u8>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder for `codec`.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(codec: Codec) -> Result<Encoder, EncodeError> {
        let failed = |reason: &str| EncodeError::Codec { length: ByteLen(0), reason: reason.to_owned() };
        let zstd = match codec {
            Codec::Lz4 => None,
            Codec::Zstd { level } => {
                let mut context = CCtx::try_create().ok_or_else(|| failed("no memory"))?;
                context
                    .set_parameter(CParameter::CompressionLevel(level))
                    .map_err(|code| failed(zstd_safe::get_error_name(code)))?;
                Some(context)
            }
        };
        Ok(Encoder { codec, zstd, buffer: Vec::new() })
    }

    /// Makes a frame of `bytes`.
    ///
    /// # Errors
    /// If there are none, or more than [`MAX_FRAME`], or the codec fails.
    pub fn encode(&mut self, bytes: &[u8]) -> Result<Encoded, EncodeError> {
        let decoded = ByteLen::of(bytes.len());
        if bytes.is_empty() || decoded > MAX_FRAME {
            return Err(EncodeError::Length { length: decoded, limit: MAX_FRAME });
        }
        match &mut self.zstd {
            Some(context) => zstd_frame(context, bytes, &mut self.buffer),
            None => lz4_frame(bytes, &mut self.buffer),
        }
        .map_err(|reason| EncodeError::Codec { length: decoded, reason })?;
        let digest = Digest::of(&self.buffer);
        Ok(Encoded { bytes: self.buffer.as_slice().to_vec(), decoded, digest })
    }
}

fn zstd_frame(context: &mut CCtx<'static>, bytes: &[u8], to: &mut Vec<u8>) -> Result<(), String> {
    let failed = |code| zstd_safe::get_error_name(code).to_owned();
    context.reset(ResetDirective::SessionOnly).map_err(failed)?;
    to.clear();
    to.reserve(zstd_safe::compress_bound(bytes.len()));
    context.compress2(to, bytes).map_err(failed)?;
    Ok(())
}

fn lz4_frame(bytes: &[u8], to: &mut Vec<u8>) -> Result<(), String> {
    let block = if bytes.len() <= 64 << 10 { BlockSize::Max64KB } else { BlockSize::Max1MB };
    let info =
        FrameInfo::new().block_mode(BlockMode::Independent).block_size(block).content_size(Some(bytes.len() as u64));
    to.clear();
    let mut encoder = FrameEncoder::with_frame_info(info, to);
    encoder.write_all(bytes).map_err(|error| error.to_string())?;
    encoder.finish().map_err(|error| error.to_string())?;
    Ok(())
}
