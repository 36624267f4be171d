//! A file that is mapped, watched, and lent to sinks without being read.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use page_units::{ByteLen, FileOffset};

use crate::identity::Identity;
use crate::sys::Mapping;
use page_source::{PageBytes, SourceError};

/// A read-only mapping of a file, and what the file looked like when it was made.
#[derive(Debug)]
pub(crate) struct MappedFile {
    file: File,
    path: PathBuf,
    map: Mapping,
    opened: Identity,
    /// Set once, when a change was seen: from then on nothing of the file is trusted.
    changed: OnceLock<&'static str>,
}

impl MappedFile {
    /// Maps the first `length` bytes of `file`, or all if it is shorter. `path` is for messages.
    pub(crate) fn new(file: File, path: PathBuf, length: FileOffset) -> Result<MappedFile, SourceError> {
        let refuse = |reason: String| SourceError::Open { path: path.clone(), reason };
        let opened = Identity::of(&file).map_err(|error| refuse(error.to_string()))?;
        let length = usize::try_from(length.0.min(opened.size())).map_err(|error| refuse(error.to_string()))?;
        let map = Mapping::of_file(&file, length).map_err(|error| refuse(format!("mapping it failed: {error}")))?;
        Ok(MappedFile { file, path, map, opened, changed: OnceLock::new() })
    }

    /// For messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Length when it was opened.
    pub(crate) fn size(&self) -> u64 {
        self.opened.size()
    }

    /// `len` bytes at `offset`, to be lent to a sink. The caller has checked that they were inside the file when it
    /// was opened; if they no longer are, the kernel answers `EFAULT` to who uses them.
    pub(crate) fn bytes(&self, offset: FileOffset, len: ByteLen) -> PageBytes<'_> {
        PageBytes::from_mapped_file(self.map.address_of(offset), len, &self.file, offset)
    }

    /// Compares the file with what it was when it was opened (one `fstat`). A difference is remembered for good.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        if let Some(what) = self.changed.get() {
            return Err(what);
        }
        let what = match Identity::of(&self.file) {
            Ok(now) => self.opened.difference(&now),
            Err(_) => Some("its attributes (they can't be read any more)"),
        };
        what.map_or(Ok(()), |what| Err(*self.changed.get_or_init(|| what)))
    }

    /// What an earlier [`check`](MappedFile::check) has found.
    pub(crate) fn known_change(&self) -> Option<&'static str> {
        self.changed.get().copied()
    }

    /// [`check`](MappedFile::check), as the answer to [`PageSource::verify`](page_source::PageSource::verify).
    pub(crate) fn verify(&self) -> Result<(), SourceError> {
        self.check().map_err(|what| SourceError::Altered { path: self.path.clone(), what })
    }

    /// Lets the kernel begin to read so much into its page cache, and does not wait for it.
    pub(crate) fn read_ahead(&self, offset: FileOffset, len: ByteLen) {
        /// The kernel reads no more for one call than the device's read-ahead size, 128 KiB by default
        /// (Linux, mm/readahead.c, `force_page_cache_ra`).
        const CALL: u64 = 128 << 10;
        let end = offset.0.saturating_add(len.0).min(self.size());
        let mut at = offset.0;
        while at < end {
            let (Ok(from), Ok(length)) = (i64::try_from(at), i64::try_from(CALL.min(end - at))) else { return };
            // A hint: whatever is wrong with the file is said by who reads it.
            if posix_fadvise(&self.file, from, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED).is_err() {
                return;
            }
            at += CALL;
        }
    }

    /// That the content of the block named so, at `offset`, could not be read.
    pub(crate) fn read_error(&self, block: &str, offset: FileOffset, length: ByteLen, error: io::Error) -> SourceError {
        SourceError::Read { path: self.path.clone(), block: block.to_owned(), offset, length, error: Arc::new(error) }
    }

    /// That the file is no longer what it was, seen while reading the block named so at `offset`.
    pub(crate) fn change_error(&self, what: &'static str, block: &str, offset: FileOffset) -> SourceError {
        SourceError::Changed { path: self.path.clone(), what, block: block.to_owned(), offset }
    }
}
