//! QEMU's mapped-ram snapshot files.

use std::path::Path;
use std::sync::Arc;

use mapped_ram::{FileRun, Options, PageError, Snapshot};
use page_units::{BlockId, ByteLen, FileOffset, Layout, PageCount, PageIndex, RamBlock};

use crate::feed::{FileFeed, Places};
use crate::mapped_file::MappedFile;
use page_source::{Content, Feed, PageSink, PageSource, SourceError, Span, Urgency};

/// A source that is a mapped-ram snapshot file.
///
/// A page whose bit is clear is zero, whatever bytes the file has in its place. Runs of stored pages follow the bits
/// exactly. The bitmaps are read piece by piece, when a request first needs them (4 KiB of bitmap for 128 MiB of RAM).
///
/// Otherwise it is like a [`FlatFile`](crate::FlatFile): requests are answered on the calling thread, from a mapping
/// that only the kernel reads; a file that changes fails; and it never ends by itself. Pages of a block whose content
/// is not in the file (x-ignore-shared) fail.
#[derive(Clone, Debug)]
pub struct MappedRam {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    mapped: MappedFile,
    snapshot: Arc<Snapshot>,
}

impl MappedRam {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// If it is not a complete mapped-ram file, or can't be mapped.
    pub fn open(path: impl AsRef<Path>) -> Result<MappedRam, SourceError> {
        MappedRam::open_with(path, &Options::default())
    }

    /// Opens the file at `path`, e.g. one in which the snapshot begins at an offset, behind something else.
    ///
    /// Pages that a damaged file lacks fail when they are asked for.
    ///
    /// # Errors
    /// If it is not a mapped-ram file that `options` allow, has no bitmaps, or can't be mapped.
    pub fn open_with(path: impl AsRef<Path>, options: &Options) -> Result<MappedRam, SourceError> {
        let path = path.as_ref();
        let snapshot = Snapshot::open_with(path, options)
            .map_err(|error| SourceError::Open { path: path.to_owned(), reason: error.kind.to_string() })?;
        MappedRam::new(Arc::new(snapshot))
    }

    /// The pages of a snapshot file that is already open.
    ///
    /// # Errors
    /// If its bitmaps were never written, it has changed since it was opened, or it can't be mapped.
    pub fn new(snapshot: Arc<Snapshot>) -> Result<MappedRam, SourceError> {
        let path = snapshot.path().to_owned();
        let refuse = |reason: String| SourceError::Open { path: path.clone(), reason };
        if snapshot.lacks_bitmaps() {
            return Err(from_page_error(&snapshot, PageError::NoBitmaps { path }));
        }
        let file = snapshot.file().try_clone().map_err(|error| refuse(error.to_string()))?;
        let ends = snapshot.layout().iter().filter_map(|(id, ram)| {
            let block = snapshot.block(id).filter(|block| block.in_file)?;
            block.pages_offset.checked_add(ram.length())
        });
        let mapped = MappedFile::new(file, path.clone(), ends.max().unwrap_or_default())?;
        // After the mapping has noted what the file looks like: from then on, it watches.
        match snapshot.changed() {
            Ok(None) => Ok(MappedRam { inner: Arc::new(Inner { mapped, snapshot }) }),
            Ok(Some(what)) => Err(SourceError::Altered { path, what }),
            Err(error) => Err(refuse(error.to_string())),
        }
    }

    /// The file: its configuration, device state and bitmaps.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.inner.snapshot
    }
}

impl PageSource for MappedRam {
    fn layout(&self) -> &Layout {
        self.inner.snapshot.layout()
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        self.run_within(block, first, PageCount(u64::MAX))
    }

    fn run_within(&self, block: BlockId, first: PageIndex, most: PageCount) -> Span {
        let pages = self.layout().get(block).map_or(PageCount(0), RamBlock::pages);
        if first.0 >= pages.0 {
            return Span { content: Content::Unknown, pages: PageCount(0) };
        }
        match self.inner.snapshot.known_run(block, first, most) {
            Some(run) => span(run),
            // How much is unknown is not known either.
            None => Span { content: Content::Unknown, pages: PageCount(1).min(most) },
        }
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        FileFeed::start(Arc::clone(&self.inner), sink, false)
    }

    fn verify(&self) -> Result<(), SourceError> {
        self.inner.mapped.verify()
    }
}

impl Places for Inner {
    fn layout(&self) -> &Layout {
        self.snapshot.layout()
    }

    fn mapped(&self) -> &MappedFile {
        &self.mapped
    }

    fn base(&self, block: BlockId) -> FileOffset {
        // A block that is not in the file has no page that could be found.
        self.snapshot.block(block).map_or(FileOffset(u64::MAX), |block| block.pages_offset)
    }

    fn find(&self, block: BlockId, first: PageIndex, most: PageCount, _: Urgency) -> Result<Span, SourceError> {
        match self.snapshot.load_run(block, first, most) {
            Ok(run) => Ok(span(run)),
            Err(error) => Err(from_page_error(&self.snapshot, error)),
        }
    }
}

fn span(run: FileRun) -> Span {
    Span { content: if run.is_stored() { Content::Stored } else { Content::Zero }, pages: run.pages() }
}

fn from_page_error(snapshot: &Snapshot, error: PageError) -> SourceError {
    match error {
        PageError::Io { path, block, at, error } => {
            SourceError::Read { path, block, offset: at, length: ByteLen(1), error: Arc::new(error) }
        }
        PageError::Changed { path, what, .. } => SourceError::Altered { path, what },
        PageError::BeyondFile { path, block, needed, actual } => SourceError::Truncated { path, block, needed, actual },
        error => {
            // It names the file itself; so does ours.
            let (path, said) = (snapshot.path().to_owned(), error.to_string());
            let reason = said.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&said).to_owned();
            SourceError::Open { path, reason }
        }
    }
}
