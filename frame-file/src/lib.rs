//! A compressed file of independent frames, with random access and a digest for every frame.
//!
//! The file is what the Zstandard seekable format says: standard frames, one behind the other, and a seek table in a
//! skippable frame at the end. `zstd -d` (or `lz4 -d`, for LZ4 frames) decodes it like any other compressed file.
//! Between the frames and the seek table lies one more skippable frame: an index that finds a frame without reading the
//! whole table, and a digest of each frame, in a tree whose root is one [`Digest`]. Who trusts the root trusts every
//! byte that is read, because each piece is checked when it is first touched.
//!
//! - [`Encoder`] turns bytes into an [`Encoded`] frame; each thread has its own.
//! - [`FrameWriter`] appends frames in the order of the file, then the index.
//! - [`compress`] does both on several threads, and [`decompress`] is its inverse.
//! - [`FrameFile`] opens a file in O(index pieces touched), finds the frame of an offset and decodes it.
//!
//! `docs/frame-file.md` describes the layout byte by byte.
//!
//! ```
//! use std::io::Cursor;
//! use frame_file::{Codec, Encoder, FrameFile, FrameWriter};
//! use page_units::{ByteLen, FileOffset};
//!
//! let mut encoder = Encoder::new(Codec::default())?;
//! let mut writer = FrameWriter::new(Cursor::new(Vec::new()), Codec::default(), ByteLen(64 << 10));
//! writer.push(&encoder.encode(b"Some bytes.")?)?;
//! writer.push_zeros(ByteLen(1 << 30))?;
//! let (file, summary) = writer.finish()?;
//!
//! let dir = tempfile::tempdir()?;
//! let path = dir.path().join("file.zst");
//! std::fs::write(&path, file.into_inner())?;
//! let file = FrameFile::open(std::fs::File::open(&path)?)?;
//! assert_eq!(file.root(), summary.root);
//! assert_eq!(file.len(), ByteLen((1 << 30) + 11));
//! let mut bytes = [0; 6];
//! file.read_exact_at(&mut bytes, FileOffset(5))?;
//! assert_eq!(&bytes, b"bytes.");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod codec;
mod compress;
mod decode;
mod decompress;
mod digest;
mod encode;
mod error;
mod format;
mod index;
mod input;
mod lz4;
mod piece;
mod reader;
mod tree;
mod writer;
mod zeros;

pub use codec::{Codec, UnknownCodec};
pub use compress::compress;
pub use decode::Decoder;
pub use decompress::{DecompressError, Output, decompress};
pub use digest::{Digest, InvalidDigest};
pub use encode::{Encoded, Encoder};
pub use error::{EncodeError, OpenError, ReadError};
pub use format::{MAX_FRAME, MAX_FRAMES, MAX_ZEROS};
pub use index::Frame;
pub use input::{Cuts, Input};
pub use reader::FrameFile;
pub use writer::{FrameWriter, Summary};
