//! How a frame is compressed.

use std::fmt;
use std::str::FromStr;

/// The level at which zstd works if none is given.
const DEFAULT_LEVEL: i32 = 3;
/// The highest level that zstd has without asking the reader for more memory.
const MAX_LEVEL: i32 = 19;

/// The format of the frames, with what the encoder needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Zstandard frames (RFC 8878).
    Zstd {
        /// Compression level, 1 (fast) to 19 (small).
        level: i32,
    },
    /// LZ4 frames: two to three times faster to decode, a third larger.
    Lz4,
}

impl Codec {
    /// Zstandard at a level, which is brought into the range of 1 to 19.
    #[must_use]
    pub fn zstd(level: i32) -> Codec {
        Codec::Zstd { level: level.clamp(1, MAX_LEVEL) }
    }

    /// The name by which [`FromStr`] knows it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Codec::Zstd { .. } => "zstd",
            Codec::Lz4 => "lz4",
        }
    }

    /// The byte that stands for it in a file.
    pub(crate) const fn tag(self) -> u8 {
        match self {
            Codec::Zstd { .. } => 1,
            Codec::Lz4 => 2,
        }
    }

    pub(crate) const fn from_tag(tag: u8) -> Option<Codec> {
        match tag {
            1 => Some(Codec::Zstd { level: DEFAULT_LEVEL }),
            2 => Some(Codec::Lz4),
            _ => None,
        }
    }
}

impl Default for Codec {
    fn default() -> Codec {
        Codec::Zstd { level: DEFAULT_LEVEL }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that stands for no codec.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" is no codec: use zstd or lz4")]
pub struct UnknownCodec {
    name: String,
}

impl FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(name: &str) -> Result<Codec, UnknownCodec> {
        match name {
            "zstd" => Ok(Codec::default()),
            "lz4" => Ok(Codec::Lz4),
            _ => Err(UnknownCodec { name: name.to_owned() }),
        }
    }
}
