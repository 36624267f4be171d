//! Decompressing a whole file on several threads.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use page_units::{ByteLen, FileOffset};
use parking_lot::Mutex;

use crate::{FrameFile, ReadError};

/// How much of the content a thread takes at a time.
const PIECE: u64 = 4 << 20;

/// Where decompressed bytes go: any place may come first, from any thread.
pub trait Output: Sync {
    /// Takes `bytes`, which begin at `offset` of the content.
    ///
    /// # Errors
    /// If they can't be written.
    fn put(&self, bytes: &[u8], offset: FileOffset) -> io::Result<()>;
}

impl Output for std::fs::File {
    fn put(&self, bytes: &[u8], offset: FileOffset) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset.0)
    }
}

/// Why a file could not be decompressed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecompressError {
    /// A frame, or the index, can't be read or is corrupt.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The output could not be written.
    #[error("writing at offset {at} failed: {error}")]
    Write {
        /// Where in the decompressed content.
        at: FileOffset,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

/// Decodes every frame of `file` on `threads` threads and gives what is not a frame of zeros to `output`, which must
/// be zero beforehand. `progress` is told how many bytes of the content are done, by any thread.
///
/// # Errors
/// The first error that a thread met; the output is not complete then.
pub fn decompress(
    file: &FrameFile,
    output: &impl Output,
    threads: NonZeroUsize,
    progress: impl Fn(ByteLen) + Sync,
) -> Result<(), DecompressError> {
    let work = Work {
        file,
        output,
        next: AtomicU64::new(0),
        done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        error: Mutex::new(None),
    };
    thread::scope(|scope| {
        for _ in 0..threads.get() {
            scope.spawn(|| work.run(&progress));
        }
    });
    work.error.into_inner().map_or(Ok(()), Err)
}

struct Work<'a, O> {
    file: &'a FrameFile,
    output: &'a O,
    /// Where the next piece begins.
    next: AtomicU64,
    done: AtomicU64,
    failed: AtomicBool,
    error: Mutex<Option<DecompressError>>,
}

impl<O: Output> Work<'_, O> {
    fn run(&self, progress: &impl Fn(ByteLen)) {
        let mut decoder = self.file.decoder();
        let mut content = Vec::new();
        let end = self.file.len().0;
        loop {
            let start = self.next.fetch_add(PIECE, Ordering::Relaxed);
            if start >= end || self.failed.load(Ordering::Relaxed) {
                return;
            }
            let limit = end.min(start.saturating_add(PIECE));
            if let Err(error) = self.piece(start..limit, &mut decoder, &mut content) {
                self.failed.store(true, Ordering::Relaxed);
                self.error.lock().get_or_insert(error);
                return;
            }
            let done = self.done.fetch_add(limit - start, Ordering::Relaxed) + (limit - start);
            progress(ByteLen(done));
        }
    }

    /// The frames that begin in `range`.
    fn piece(
        &self,
        range: std::ops::Range<u64>,
        decoder: &mut crate::Decoder,
        content: &mut Vec<u8>,
    ) -> Result<(), DecompressError> {
        let first = self.file.frame_at(FileOffset(range.start))?;
        let begins_before = first.decoded().start.0 < range.start;
        let mut at = if begins_before { first.decoded().end } else { first.decoded().start };
        while at.0 < range.end {
            let frame = self.file.frame_at(at)?;
            if !frame.is_zero() {
                self.file.decode(&frame, decoder, content)?;
                self.output.put(content, at).map_err(|error| DecompressError::Write { at, error })?;
            }
            at = frame.decoded().end;
        }
        Ok(())
    }
}
