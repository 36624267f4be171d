//! Reading a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use page_units::{ByteLen, FileOffset};
use parking_lot::Mutex;

use crate::format::{
    FOOTER, INDEX_MAGIC, NODE, Places, SKIPPABLE_HEADER, TABLE_MAGIC, TRAILER, TRAILER_MAGIC, Trailer, parse_footer,
    u32_at,
};
use crate::index::{Frame, Index, read};
use crate::piece::{At, Piece};
use crate::{Codec, Decoder, Digest, OpenError, ReadError};

/// The most decoders that are kept for [`FrameFile::read_exact_at`], each with the last frame that it decoded.
const KEPT: usize = 4;

/// An open file of frames. Opening reads the end of the file; pieces of the index are read when they are first needed.
/// All methods may be called from several threads.
#[derive(Debug)]
pub struct FrameFile {
    file: File,
    index: Index,
    root: Digest,
    kept: Mutex<Vec<Kept>>,
}

/// A decoder, and what it has decoded last: metadata is read in small pieces, one behind the other.
#[derive(Debug)]
struct Kept {
    decoder: Decoder,
    frame: Option<u64>,
    content: Vec<u8>,
}

impl FrameFile {
    /// Opens a file, or a block device.
    ///
    /// # Errors
    /// If it does not end with a seek table and an index of ours, or they contradict each other.
    pub fn open(file: File) -> Result<FrameFile, OpenError> {
        let size = length(&file)?;
        let Some(frames) = footer(&file, size)? else { return Err(OpenError::NoSeekTable) };
        // What follows the frames has a length of its own; hence where they end.
        let after = Places::new(0, frames).ok_or(OpenError::NoSeekTable)?.end.0;
        let encoded = size.0.checked_sub(after).ok_or(OpenError::NoSeekTable)?;
        let places = Places::new(encoded, frames).ok_or(OpenError::NoSeekTable)?;
        check_header(&file, places.table, TABLE_MAGIC, size.0 - places.table.0)?.ok_or(OpenError::NoSeekTable)?;
        let mut trailer = [0; TRAILER];
        read_exact(&file, &mut trailer, places.trailer)?;
        if trailer[..8] != TRAILER_MAGIC {
            return Err(OpenError::NoIndex);
        }
        check_header(&file, places.digests, INDEX_MAGIC, places.index_len())?.ok_or(OpenError::NoIndex)?;
        let corrupt = |what| OpenError::Corrupt { at: places.trailer, what };
        let (trailer, root) = Trailer::parse(&trailer).map_err(corrupt)?;
        if trailer.frames != frames || trailer.encoded != encoded {
            return Err(corrupt("it belongs to another seek table"));
        }
        let top = top(&file, &places, &trailer)?;
        let index = Index::new(trailer, places, top);
        Ok(FrameFile { file, index, root, kept: Mutex::default() })
    }

    /// Whether a file ends as one of ours does: a cheap look that reads a few bytes.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn is_frame_file(file: &File) -> io::Result<bool> {
        let seen = || -> Result<bool, OpenError> {
            let size = length(file)?;
            let Some(places) = footer(file, size)?.and_then(|frames| Places::new(0, frames)) else { return Ok(false) };
            let Some(trailer) = size.0.checked_sub(places.end.0 - places.trailer.0) else { return Ok(false) };
            let mut magic = [0; 8];
            read_exact(file, &mut magic, FileOffset(trailer))?;
            Ok(magic == TRAILER_MAGIC)
        };
        match seen() {
            Ok(is) => Ok(is),
            Err(OpenError::Read { error, .. }) => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// The open file. Its own position is never used.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// How many bytes it decodes to.
    #[must_use]
    pub fn len(&self) -> ByteLen {
        ByteLen(self.index.trailer.decoded)
    }

    /// Whether it decodes to nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.trailer.decoded == 0
    }

    /// The digest that covers every byte of the content.
    #[must_use]
    pub fn root(&self) -> Digest {
        self.root
    }

    /// How its frames are compressed; the level is not known.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.index.trailer.codec
    }

    /// How many frames there are.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.index.trailer.frames
    }

    /// The most bytes that a frame with content decodes to.
    #[must_use]
    pub fn frame_limit(&self) -> ByteLen {
        ByteLen(self.index.trailer.frame_limit.into())
    }

    /// The frame that holds the decoded byte at `offset`.
    ///
    /// # Errors
    /// If the content ends before it, or the index can't be read or is corrupt.
    pub fn frame_at(&self, offset: FileOffset) -> Result<Frame, ReadError> {
        let end = FileOffset(self.len().0);
        if offset >= end {
            return Err(ReadError::BeyondEnd { end, asked: FileOffset(offset.0.saturating_add(1)) });
        }
        self.index.find(&self.file, offset)
    }

    /// A decoder for the frames of this file.
    #[must_use]
    pub fn decoder(&self) -> Decoder {
        Decoder::new(self.codec())
    }

    /// Decodes a frame into `to`, which becomes exactly as long as it is. Nothing reaches the decoder that does not
    /// match its digest.
    ///
    /// # Errors
    /// If the frame can't be read, or is corrupt.
    ///
    /// # Panics
    /// If the frame [is zero](Frame::is_zero): those may be 2 GiB long, and need no decoding.
    pub fn decode(&self, frame: &Frame, decoder: &mut Decoder, to: &mut Vec<u8>) -> Result<(), ReadError> {
        assert!(!frame.is_zero(), "a frame of zeros is not decoded");
        let at = frame.encoded.start;
        decoder.encoded.resize((frame.encoded.end - at).get(), 0);
        self.file.read_exact_at(&mut decoder.encoded, at.0).map_err(|error| ReadError::Read { at, error })?;
        let corrupt = |what| ReadError::Frame { frame: frame.number, at, what };
        if Digest::of(&decoder.encoded) != frame.digest {
            return Err(corrupt("it does not match its digest"));
        }
        to.resize(frame.decoded_len().get(), 0);
        decoder.decode(to).map_err(corrupt)
    }

    /// Fills `to` with the decoded bytes from `offset` on: for metadata and small parts. Every frame that is touched is
    /// decoded.
    ///
    /// # Errors
    /// If the content is shorter, or a frame can't be read or is corrupt.
    pub fn read_exact_at(&self, to: &mut [u8], offset: FileOffset) -> Result<(), ReadError> {
        let end = FileOffset(self.len().0);
        let asked = offset.checked_add(ByteLen::of(to.len())).unwrap_or(FileOffset(u64::MAX));
        if asked > end {
            return Err(ReadError::BeyondEnd { end, asked });
        }
        let mut kept = self.kept.lock().pop().unwrap_or_else(|| Kept {
            decoder: self.decoder(),
            frame: None,
            content: Vec::new(),
        });
        let mut done = 0;
        while done < to.len() {
            let at = offset + ByteLen::of(done);
            let frame = self.frame_at(at)?;
            let now = (to.len() - done).min((frame.decoded.end - at).get());
            let place = &mut to[done..done + now];
            if frame.is_zero() {
                place.fill(0);
            } else {
                if kept.frame != Some(frame.number) {
                    kept.frame = None;
                    self.decode(&frame, &mut kept.decoder, &mut kept.content)?;
                    kept.frame = Some(frame.number);
                }
                let from = (at - frame.decoded.start).get();
                place.copy_from_slice(&kept.content[from..from + now]);
            }
            done += now;
        }
        let mut all = self.kept.lock();
        if all.len() < KEPT {
            all.push(kept);
        }
        Ok(())
    }
}

/// The length of a file, or of a block device, whose metadata does not tell.
fn length(file: &File) -> Result<FileOffset, OpenError> {
    use std::io::{Seek, SeekFrom};
    let failed = |error| OpenError::Read { at: FileOffset(0), error };
    let size = file.metadata().map_err(failed)?.len();
    if size > 0 {
        return Ok(FileOffset(size));
    }
    let mut file = file;
    file.seek(SeekFrom::End(0)).map(FileOffset).map_err(failed)
}

/// How many frames the seek table at the end of the file has; `None` if there is none.
fn footer(file: &File, size: FileOffset) -> Result<Option<u64>, OpenError> {
    let Some(at) = size.0.checked_sub(FOOTER as u64) else { return Ok(None) };
    let mut footer = [0; FOOTER];
    read_exact(file, &mut footer, FileOffset(at))?;
    Ok(parse_footer(&footer))
}

/// Whether the skippable frame whose content begins at `content` has the header that it should.
fn check_header(file: &File, content: FileOffset, magic: u32, length: u64) -> Result<Option<()>, OpenError> {
    let mut header = [0; SKIPPABLE_HEADER];
    read_exact(file, &mut header, FileOffset(content.0 - SKIPPABLE_HEADER as u64))?;
    let right = u32_at(&header, 0) == magic && u64::from(u32_at(&header, 4)) == length;
    Ok(right.then_some(()))
}

fn top(file: &File, places: &Places, trailer: &Trailer) -> Result<Piece, OpenError> {
    let (at, nodes) = places.levels[places.levels.len() - 1];
    let corrupt = |what| OpenError::Corrupt { at, what };
    let start = At { encoded: 0, decoded: 0 };
    let end = At { encoded: trailer.encoded, decoded: trailer.decoded };
    if nodes == 0 {
        // A file of no content.
        return if end == start { Ok(Piece::empty()) } else { Err(corrupt("there is content but no frame")) };
    }
    let bytes = read(file, at, nodes * NODE as u64).map_err(|error| match error {
        ReadError::Read { at, error } => OpenError::Read { at, error },
        _ => corrupt("it can't be read"),
    })?;
    Piece::of_nodes(&bytes, trailer.top, start, end).map_err(corrupt)
}

fn read_exact(file: &File, bytes: &mut [u8], at: FileOffset) -> Result<(), OpenError> {
    file.read_exact_at(bytes, at.0).map_err(|error| OpenError::Read { at, error })
}
