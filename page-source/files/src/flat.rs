//! Flat memory files: the bytes of each block, one after the other, as Firecracker and Cloud Hypervisor write them.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use page_source::{Content, Feed, PageSink, PageSource, Pages, SourceError, SourceErrorKind, Span, Subject, Urgency};
use page_units::{ByteLen, FileOffset, Layout, LayoutError, PAGE_SIZE, PageCount, PageRun, RamBlock};

use crate::extents::{Extents, seek};
use crate::feed::FileFeed;
use crate::holes::Holes;
use crate::mapped_file::MappedFile;
use crate::places::{Extent, Places};
use mapped_ram::Watch;

/// A RAM block and where it lies in a flat file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatBlock {
    /// The block.
    pub block: RamBlock,
    /// The position of its first byte.
    pub offset: FileOffset,
}

impl FlatBlock {
    /// These blocks one behind the other, the first at offset 0: the order in which Firecracker (`mem_file_path`) and
    /// Cloud Hypervisor (`memory-ranges`) write guest regions.
    ///
    /// # Errors
    /// If the offsets do not fit 64 bits.
    pub fn concatenated(blocks: Vec<RamBlock>) -> Result<Vec<FlatBlock>, LayoutError> {
        let mut offset = FileOffset(0);
        let mut all = Vec::with_capacity(blocks.len());
        for block in blocks {
            let next = offset.checked_add(block.length()).ok_or(LayoutError::TooLarge)?;
            all.push(FlatBlock { block, offset });
            offset = next;
        }
        Ok(all)
    }
}

/// How a flat file is opened.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct FlatOptions {
    /// By what a change of the file is noticed.
    pub watch: Watch,
}

impl FlatOptions {
    /// Sets by what a change of the file is noticed.
    #[must_use]
    pub fn with_watch(mut self, watch: Watch) -> FlatOptions {
        self.watch = watch;
        self
    }
}

/// A source that is a flat memory file.
///
/// Requests are answered on the calling thread, straight from a read-only mapping that only the kernel ever reads.
/// Holes are zero; they are found when a background request comes to them. (A hole of a *diff* snapshot means "look
/// in the parent" instead: such a file has to be merged first.)
///
/// Where the file ends in the middle of the last page of a block, the rest of that page is zero. While pages are
/// loaded the file must not be written to: its size and its modification time are [watched](Watch), and a change fails
/// what is delivered from then on, and [`finish`](Feed::finish). A link, a new name or other rights are no change,
/// nor is the removal of its name.
///
/// What a file system says of holes is believed where that is known to be right (ext4, XFS, btrfs, tmpfs, F2FS,
/// bcachefs); of a file elsewhere, as on FUSE or a network file system, every page is read, and looked at for zeros.
///
/// A flow from it ends as [`End::Stopped`](page_source::End::Stopped): what was delivered is what was asked for.
#[derive(Clone, Debug)]
pub struct FlatFile {
    inner: Arc<Inner>,
    scan_for_zeros: bool,
}

#[derive(Debug)]
struct Inner {
    mapped: MappedFile,
    layout: Layout,
    bases: Vec<FileOffset>,
    extents: Vec<Extents>,
    holes: Holes,
}

impl FlatFile {
    /// Opens the file at `path`, which holds `blocks`.
    ///
    /// # Errors
    /// If it can't be opened or mapped, is not a regular file, or is too short.
    pub fn open(path: impl AsRef<Path>, blocks: Vec<FlatBlock>) -> Result<FlatFile, SourceError> {
        FlatFile::open_with(path, blocks, &FlatOptions::default())
    }

    /// The same, as the options say.
    ///
    /// # Errors
    /// As for [`open`](FlatFile::open).
    pub fn open_with(
        path: impl AsRef<Path>,
        blocks: Vec<FlatBlock>,
        options: &FlatOptions,
    ) -> Result<FlatFile, SourceError> {
        let path = path.as_ref();
        // Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|error| {
            SourceError::new(SourceErrorKind::Unreadable, Subject::file(path), "can't be opened").with_cause(error)
        })?;
        FlatFile::from_file_with(file, path, blocks, options)
    }

    /// The same for an open file. `path` is only for messages.
    ///
    /// # Errors
    /// As for [`open`](FlatFile::open).
    pub fn from_file(file: File, path: impl Into<PathBuf>, blocks: Vec<FlatBlock>) -> Result<FlatFile, SourceError> {
        FlatFile::from_file_with(file, path, blocks, &FlatOptions::default())
    }

    /// The same, as the options say.
    ///
    /// # Errors
    /// As for [`open`](FlatFile::open).
    pub fn from_file_with(
        file: File,
        path: impl Into<PathBuf>,
        blocks: Vec<FlatBlock>,
        options: &FlatOptions,
    ) -> Result<FlatFile, SourceError> {
        let bases: Vec<FileOffset> = blocks.iter().map(|block| block.offset).collect();
        let layout = Layout::new(blocks.into_iter().map(|block| block.block).collect())?;
        let mut end = FileOffset(0);
        for (block, base) in layout.blocks().iter().zip(&bases) {
            end = end.max(base.checked_add(block.length()).ok_or(LayoutError::TooLarge)?);
        }
        let mapped = MappedFile::new(file, path.into(), end, options.watch)?;
        for ((block, whole), base) in layout.blocks().iter().zip(layout.runs()).zip(&bases) {
            let needed = *base + block.length();
            let last_page = needed.0 - PAGE_SIZE.min(block.length().0);
            if block.length() > ByteLen(0) && mapped.size() <= last_page {
                return Err(mapped.truncated(block.name(), whole, needed));
            }
        }
        let extents = layout.blocks().iter().map(|_| Extents::default()).collect();
        let holes = Holes::of(mapped.file());
        // Where holes are unknown, zeros are what they may be.
        let scan_for_zeros = holes == Holes::Unknown;
        Ok(FlatFile { inner: Arc::new(Inner { mapped, layout, bases, extents, holes }), scan_for_zeros })
    }

    /// Whether the feeds started from now on look through stored pages for zero pages, and deliver them as such. Off
    /// at first: it reads every page once more, which is worth it where many are zero without being holes. Always on where the file system is not believed.
    #[must_use]
    pub fn with_zero_scan(mut self, on: bool) -> FlatFile {
        self.scan_for_zeros = on || self.inner.holes == Holes::Unknown;
        self
    }
}

impl Pages for FlatFile {
    fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    fn content(&self, run: PageRun) -> Span {
        let run = self.inner.layout.clip(run);
        if run.is_empty() {
            return Span::OUTSIDE;
        }
        let span = self.inner.extents[run.block.0 as usize].known_or_unknown(run.first);
        Span { pages: span.pages.min(run.pages), ..span }
    }
}

impl PageSource for FlatFile {
    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        FileFeed::start(Arc::clone(&self.inner), sink, self.scan_for_zeros)
    }
}

impl Places for Inner {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn files(&self) -> impl Iterator<Item = &MappedFile> {
        std::iter::once(&self.mapped)
    }

    fn find(&self, run: PageRun, urgency: Urgency) -> Result<Extent<'_>, SourceError> {
        let extents = &self.extents[run.block.0 as usize];
        let offset = self.bases[run.block.0 as usize] + run.first.byte_offset();
        let at = Some((&self.mapped, offset));
        let span = if urgency == Urgency::Demand {
            // Looking for the end of a hole may take long; the page itself is at hand.
            let one = Span::new(Content::Unknown, PageCount(1));
            extents.at_without_waiting(run.first).unwrap_or(one)
        } else {
            extents.at(run.first).map_or_else(|| self.look(run, offset), Ok)?
        };
        Ok(Extent { content: span.content, pages: span.pages, at })
    }
}

impl Inner {
    /// Asks the file system whether the pages at `offset` are a hole.
    fn look(&self, run: PageRun, offset: FileOffset) -> Result<Span, SourceError> {
        if self.holes != Holes::Told {
            return Ok(Span::new(Content::Stored, run.pages));
        }
        let name = || self.layout.get(run.block).map_or("?", RamBlock::name);
        let base = self.bases[run.block.0 as usize];
        let (content, end) = seek(self.mapped.file(), base, run.first, self.mapped.size())
            .map_err(|error| self.mapped.read_error(name(), run, offset, ByteLen(PAGE_SIZE), error))?;
        // A hole may be one because the file was cut off since the last look: that must not pass for zeros.
        if content == Content::Zero
            && let Err(what) = self.mapped.check()
        {
            return Err(self.mapped.change_error(what, name(), run, offset));
        }
        self.extents[run.block.0 as usize].learn(run.first, end, content);
        Ok(Span { content, pages: end - run.first })
    }
}
