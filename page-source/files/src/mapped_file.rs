//! A file that is mapped, watched, and lent to sinks without being read.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use page_source::{PageBytes, SourceError, SourceErrorKind, Subject, Urgency};
use page_units::{ByteLen, FileOffset, PageRun};

use crate::sys::Mapping;
use mapped_ram::{Identity, Watch};

/// How old the latest check for changes may be when a page is served on demand: asking costs a good part of what serving
/// the page costs.
const CHECK_EVERY: Duration = Duration::from_micros(100);

/// A read-only mapping of a file, what the file looked like when it was made, and by what a change is noticed.
#[derive(Debug)]
pub(crate) struct MappedFile {
    file: File,
    path: PathBuf,
    map: Mapping,
    opened: Identity,
    watch: Watch,
    /// Set once, when a change was seen: from then on nothing of the file is trusted.
    changed: OnceLock<&'static str>,
    mapped: Instant,
    /// When it was checked last, by any of the flows from it: nanoseconds after it was mapped.
    checked: AtomicU64,
}

impl MappedFile {
    /// Maps the first `length` bytes of `file`, or all if it is shorter. `path` is for messages. Only a regular file has
    /// a length that can be relied on.
    pub(crate) fn new(file: File, path: PathBuf, length: FileOffset, watch: Watch) -> Result<MappedFile, SourceError> {
        let refuse = |what: &str| SourceError::new(SourceErrorKind::Unreadable, Subject::file(&path), what);
        let metadata = file.metadata().map_err(|error| refuse("it can't be used").with_cause(error))?;
        if !metadata.is_file() {
            return Err(refuse("not a regular file"));
        }
        let opened = Identity::from_metadata(&metadata);
        let length = usize::try_from(length.0.min(opened.size))
            .map_err(|error| refuse("it can't be mapped").with_cause(error))?;
        let map = Mapping::of_file(&file, length).map_err(|error| refuse("mapping it failed").with_cause(error))?;
        let (changed, checked) = (OnceLock::new(), AtomicU64::new(0));
        Ok(MappedFile { file, path, map, opened, watch, changed, mapped: Instant::now(), checked })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Length when it was opened.
    pub(crate) fn size(&self) -> u64 {
        self.opened.size
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
            Ok(now) => self.opened.difference(&now, self.watch),
            Err(_) => Some("its attributes (they can't be read any more)"),
        };
        what.map_or(Ok(()), |what| Err(*self.changed.get_or_init(|| what)))
    }

    /// The same before something is delivered: always in the background, on demand only if nobody has looked lately.
    pub(crate) fn check_for(&self, urgency: Urgency) -> Result<(), &'static str> {
        if urgency == Urgency::Demand {
            let now = u64::try_from(self.mapped.elapsed().as_nanos()).unwrap_or(u64::MAX);
            let age = now.saturating_sub(self.checked.load(Ordering::Relaxed));
            if u128::from(age) < CHECK_EVERY.as_nanos() {
                return self.changed.get().map_or(Ok(()), |what| Err(what));
            }
            self.checked.store(now, Ordering::Relaxed);
        }
        self.check()
    }

    /// Whether it is still what it was when it was opened.
    pub(crate) fn verify(&self) -> Result<(), SourceError> {
        self.check().map_err(|what| changed(&self.path, what))
    }

    /// What an earlier [`check`](MappedFile::check) has found.
    pub(crate) fn known_error(&self) -> Option<SourceError> {
        self.changed.get().map(|what| changed(&self.path, what))
    }

    /// Lets the kernel begin to read `len` bytes into its page cache, and does not wait for it.
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

    /// That pages of the block named so, at `offset`, could not be read.
    pub(crate) fn read_error(
        &self,
        block: &str,
        run: PageRun,
        offset: FileOffset,
        length: ByteLen,
        error: io::Error,
    ) -> SourceError {
        let what = format!("reading {length} bytes of RAM block \"{block}\" at file offset {offset} failed");
        SourceError::new(SourceErrorKind::Unreadable, self.subject(block, run).at(offset), what).with_cause(error)
    }

    /// That the file is no longer what it was, seen while reading pages of the block named so at `offset`.
    pub(crate) fn change_error(&self, what: &str, block: &str, run: PageRun, offset: FileOffset) -> SourceError {
        let what = format!(
            "{what} changed while pages were being loaded from it (RAM block \"{block}\", file offset {offset}): {}",
            advice(what)
        );
        SourceError::new(SourceErrorKind::Changed, self.subject(block, run).at(offset), what)
    }

    /// That the file ends before the content of these pages, which needs bytes up to `needed`.
    pub(crate) fn truncated(&self, block: &str, run: PageRun, needed: FileOffset) -> SourceError {
        let actual = FileOffset(self.size());
        let what = format!(
            "RAM block \"{block}\" needs bytes up to file offset {needed}, but the file ends at {actual}: it was \
             truncated or is still being written"
        );
        SourceError::new(SourceErrorKind::Truncated, self.subject(block, run).at(actual), what)
    }

    fn subject(&self, block: &str, run: PageRun) -> Subject {
        Subject::file(&self.path).block(block).run(run)
    }
}

/// That a file is not what it was when it was opened.
pub(crate) fn changed(path: &Path, what: &str) -> SourceError {
    let what =
        format!("{what} changed since it was opened, so what was loaded from it can't be trusted: {}", advice(what));
    SourceError::new(SourceErrorKind::Changed, Subject::file(path), what)
}

/// What to do against a change of a file: of its times, there may be another cause.
fn advice(what: &str) -> &'static str {
    if what.contains(" time") {
        "keep a snapshot file unchanged while a guest runs from it (or, where a file system moves times by itself, as FUSE \
         and network file systems may, watch its size only: `Watch::Size`, `fastload --watch size`)"
    } else {
        "keep a snapshot file unchanged while a guest runs from it"
    }
}
