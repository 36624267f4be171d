//! QEMU's mapped-ram snapshot files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use mapped_ram::{FileRun, Options, PageError, Snapshot};
use page_source::{Content, Feed, PageSink, PageSource, Pages, SourceError, SourceErrorKind, Span, Subject, Urgency};
use page_units::{BlockId, FileOffset, Layout, PAGE_SIZE, PageCount, PageIndex, PageRun};

use crate::feed::FileFeed;
use crate::frames::{FrameFeed, Frames};
use crate::mapped_file::{MappedFile, changed};
use crate::places::{Extent, Places};

/// A source that is a mapped-ram snapshot file.
///
/// A page whose bit is clear is zero, whatever bytes the file has in its place. Runs of stored pages follow the bits
/// exactly. The bitmaps are read piece by piece, when a request first needs them (4 KiB of bitmap for 128 MiB of RAM).
///
/// Otherwise it is like a [`FlatFile`](crate::FlatFile): requests are answered on the calling thread, from a mapping
/// that only the kernel reads; a file that changes fails; and it never ends by itself. Pages of a block whose content
/// is not in the file (x-ignore-shared) fail.
///
/// A compressed snapshot is read frame by frame instead: a request decodes the frames that hold its pages, each frame is
/// checked against its digest before, and what else the frame of a demanded page holds is delivered behind it. It needs
/// no watching, because bytes that changed do not match their digest.
#[derive(Clone, Debug)]
pub struct MappedRam {
    snapshot: Arc<Snapshot>,
    stored: Stored,
}

/// Where the content of stored pages is.
#[derive(Clone, Debug)]
enum Stored {
    Plain(Arc<Plain>),
    Frames(Arc<Frames>),
}

#[derive(Debug)]
struct Plain {
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
            .map_err(|error| SourceError::new(SourceErrorKind::Corrupt, Subject::file(path), error.kind.to_string()))?;
        MappedRam::new(Arc::new(snapshot))
    }

    /// The pages of a snapshot file that is already open.
    ///
    /// # Errors
    /// If its bitmaps were never written, it has changed since it was opened, or it can't be mapped.
    pub fn new(snapshot: Arc<Snapshot>) -> Result<MappedRam, SourceError> {
        let path = snapshot.path().to_owned();
        let refuse = |error| {
            SourceError::new(SourceErrorKind::Unreadable, Subject::file(&path), "it can't be used").with_cause(error)
        };
        if snapshot.lacks_bitmaps() {
            let nothing = PageRun::new(BlockId(0), PageIndex(0), PageCount(0));
            return Err(from_page_error(&snapshot, nothing, PageError::NoBitmaps { path }));
        }
        if let Some(frames) = Frames::new(&snapshot) {
            return Ok(MappedRam { snapshot, stored: Stored::Frames(Arc::new(frames)) });
        }
        let file = snapshot.plain_file().map_or_else(|| Err(std::io::ErrorKind::Unsupported.into()), File::try_clone);
        let file = file.map_err(refuse)?;
        let ends = snapshot.layout().iter().filter_map(|(id, ram)| {
            let block = snapshot.block(id).filter(|block| block.in_file)?;
            block.pages_offset.checked_add(ram.length())
        });
        let mapped = MappedFile::new(file, path.clone(), ends.max().unwrap_or_default(), snapshot.watch())?;
        // After the mapping has noted what the file looks like: from then on, it watches.
        match snapshot.changed() {
            Ok(None) => {
                let plain = Plain { mapped, snapshot: Arc::clone(&snapshot) };
                Ok(MappedRam { snapshot, stored: Stored::Plain(Arc::new(plain)) })
            }
            Ok(Some(what)) => Err(changed(&path, what)),
            Err(error) => Err(refuse(error)),
        }
    }

    /// The file: its configuration, device state and bitmaps.
    #[must_use]
    pub fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }
}

impl Pages for MappedRam {
    fn layout(&self) -> &Layout {
        self.snapshot.layout()
    }

    fn content(&self, run: PageRun) -> Span {
        let run = self.layout().clip(run);
        if run.is_empty() {
            return Span::OUTSIDE;
        }
        match self.snapshot.known_run(run.block, run.first, run.pages) {
            Some(known) => span(known, run),
            // How much is unknown is not known either.
            None => Span::new(Content::Unknown, PageCount(1)),
        }
    }

    /// Of a compressed snapshot, the pages that one frame holds at most: `fastload compress` counts them from the start
    /// of the block.
    fn unit(&self, block: BlockId, page: PageIndex) -> PageRun {
        let Some(frames) = self.snapshot.frames() else { return PageRun::single(block, page) };
        let pages = (frames.frame_limit().0 / PAGE_SIZE).max(1);
        let first = PageIndex(page.0 - page.0 % pages);
        self.layout().clip(PageRun::new(block, first, PageCount(pages)))
    }
}

impl PageSource for MappedRam {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        match &self.stored {
            Stored::Plain(plain) => FileFeed::start(Arc::clone(plain), sink, false),
            Stored::Frames(frames) => Ok(FrameFeed::start(Arc::clone(frames), sink)),
        }
    }
}

impl Places for Plain {
    fn layout(&self) -> &Layout {
        self.snapshot.layout()
    }

    fn files(&self) -> impl Iterator<Item = &MappedFile> {
        std::iter::once(&self.mapped)
    }

    fn find(&self, run: PageRun, _: Urgency) -> Result<Extent<'_>, SourceError> {
        match self.snapshot.load_run(run.block, run.first, run.pages) {
            Ok(found) => {
                let Span { content, pages } = span(found, run);
                Ok(Extent { content, pages, at: Some((&self.mapped, self.offset(run))) })
            }
            Err(error) => Err(from_page_error(&self.snapshot, run, error)),
        }
    }
}

impl Plain {
    /// Where the first page of `run` is. A block that is not in the file has no page that could be found: saturates there,
    /// which no file has.
    fn offset(&self, run: PageRun) -> FileOffset {
        let base = self.snapshot.block(run.block).map_or(u64::MAX, |block| block.pages_offset.0);
        FileOffset(base.saturating_add(run.first.byte_offset().0))
    }
}

/// What was found of `run`.
fn span(found: FileRun, run: PageRun) -> Span {
    let content = if found.is_stored() { Content::Stored } else { Content::Zero };
    Span::new(content, found.pages().min(run.pages))
}

pub(crate) fn from_page_error(snapshot: &Snapshot, run: PageRun, error: PageError) -> SourceError {
    let subject = Subject::file(snapshot.path()).run(run);
    match error {
        PageError::Io { block, at, error, .. } => {
            let what = format!("reading the bitmap of RAM block \"{block}\" at file offset {at} failed");
            SourceError::new(SourceErrorKind::Unreadable, subject.block(block).at(at), what).with_cause(error)
        }
        PageError::BeyondFile { block, needed, actual, .. } => {
            let what = format!(
                "RAM block \"{block}\" needs bytes up to file offset {needed}, but the file ends at {actual}: it was \
                 truncated or is still being written"
            );
            SourceError::new(SourceErrorKind::Truncated, subject.block(block).at(actual), what)
        }
        PageError::Changed { what, .. } => changed(snapshot.path(), what),
        error => {
            // It names the file itself; so does ours.
            let said = error.to_string();
            let what = said.strip_prefix(&format!("{}: ", snapshot.path().display())).unwrap_or(&said);
            SourceError::new(SourceErrorKind::Corrupt, subject, what)
        }
    }
}
