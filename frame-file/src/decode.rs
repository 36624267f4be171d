//! Frames to bytes.

use std::fmt;

use zstd_safe::DCtx;

use crate::{Codec, lz4};

/// Decompresses, one frame at a time. Each thread has its own.
pub struct Decoder {
    zstd: Option<DCtx<'static>>,
    /// The frame as it was read.
    pub(crate) encoded: Vec<u8>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("zstd", &self.zstd.is_some()).finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder for frames of `codec`. Takes memory when it is first used.
    #[must_use]
    pub fn new(codec: Codec) -> Decoder {
        let zstd = match codec {
            Codec::Zstd { .. } => Some(DCtx::create()),
            Codec::Lz4 => None,
        };
        Decoder { zstd, encoded: Vec::new() }
    }

    /// Decodes the frame that was read into exactly `to`, or says what is wrong with it.
    pub(crate) fn decode(&mut self, to: &mut [u8]) -> Result<(), &'static str> {
        match &mut self.zstd {
            None => lz4::decode(&self.encoded, to),
            Some(context) => match context.decompress(to, &self.encoded) {
                Ok(length) if length == to.len() => Ok(()),
                Ok(_) => Err("it has another length than the index says"),
                Err(_) => Err("it can't be decoded"),
            },
        }
    }
}
