//! An open snapshot file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use frame_file::FrameFile;
use page_units::{BlockId, ByteLen, FileOffset, Layout, PageCount, PageIndex};
use vmstate::{Configuration, SectionEntry, VmDesc};

use crate::bitmap::{Bitmap, BitmapError, Watched, pages_between};
use crate::bytes::Bytes;
use crate::open::{self, Opened, Options};
use crate::parse::Parsed;
use crate::{BlockFile, FileRun, Identity, OpenError, OpenErrorKind, PageError, Warning, Watch};

/// The most that goes into memory at once.
const MAX_READ: ByteLen = ByteLen(1 << 30);

/// A snapshot file in QEMU's mapped-ram format.
///
/// Opening reads what describes the snapshot and none of its RAM; the bitmaps that tell stored pages from zero pages
/// are read piece by piece when they are first asked for. All methods may be called from several threads.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Bytes,
    pub(crate) identity: Identity,
    pub(crate) watch: Watch,
    pub(crate) base: FileOffset,
    pub(crate) configuration: Configuration,
    pub(crate) layout: Layout,
    pub(crate) blocks: Vec<BlockFile>,
    pub(crate) bitmaps: Vec<Option<Bitmap>>,
    pub(crate) sections: Vec<SectionEntry>,
    /// Where the devices' are among them, by name and instance; made when it is first asked for.
    pub(crate) by_device: OnceLock<Vec<usize>>,
    pub(crate) devices: Range<FileOffset>,
    pub(crate) end: FileOffset,
    pub(crate) vmdesc: Option<VmDesc>,
    pub(crate) complete: bool,
    pub(crate) no_bitmaps: bool,
    pub(crate) warnings: Vec<Warning>,
}

impl Snapshot {
    /// Opens a file. A stream behind a foreign header (QEMU's `file:PATH,offset=N`) is found if it begins in the first
    /// MiB.
    ///
    /// # Errors
    /// If the file can't be read, is no mapped-ram stream, or is not complete.
    pub fn open(path: impl AsRef<Path>) -> Result<Snapshot, OpenError> {
        Snapshot::open_with(path, &Options::default())
    }

    /// Opens a file as the options say.
    ///
    /// # Errors
    /// As [`open`](Snapshot::open); with [`Options::damaged`], of an incomplete file only if not even its list of RAM
    /// blocks begins.
    pub fn open_with(path: impl AsRef<Path>, options: &Options) -> Result<Snapshot, OpenError> {
        let path = path.as_ref();
        let opened = open::open(path, options).and_then(|opened| Snapshot::new(path, opened));
        opened.map_err(|kind| OpenError { path: path.to_owned(), kind })
    }

    /// A snapshot of what was found in a file.
    fn new(path: &Path, opened: Opened) -> Result<Snapshot, OpenErrorKind> {
        let Opened { bytes, identity, watch, base, parsed } = opened;
        let Parsed { configuration, blocks, sections, devices, end, vmdesc, complete, ram_ended, warnings } = parsed;
        let size = FileOffset(bytes.size());
        let bitmaps = blocks.iter().map(|block| {
            let pages_in_file = pages_between(block.file.pages_offset, size);
            block.file.in_file.then(|| Bitmap::new(block.file.bitmap_offset, block.ram.pages(), pages_in_file))
        });
        let bitmaps = bitmaps.collect();
        let (ram, blocks) = blocks.into_iter().map(|block| (block.ram, block.file)).unzip();
        let layout = Layout::new(ram)?;
        let mut snapshot = Snapshot {
            path: path.to_owned(),
            bytes,
            identity,
            watch,
            base,
            configuration,
            layout,
            blocks,
            bitmaps,
            sections,
            by_device: OnceLock::new(),
            devices,
            end,
            vmdesc,
            complete,
            no_bitmaps: false,
            warnings,
        };
        if !ram_ended && snapshot.nothing_stored() {
            snapshot.no_bitmaps = true;
            snapshot.warnings.push(Warning::BitmapsNotWritten);
        }
        Ok(snapshot)
    }

    /// Whether the bitmaps tell of no page at all, although there are pages in the file. Reads all of them: only for
    /// files whose RAM section never ended.
    fn nothing_stored(&self) -> bool {
        let mut blocks = self.layout.iter().filter(|(id, _)| self.bitmap(*id).is_some()).peekable();
        blocks.peek().is_some() && blocks.all(|(id, _)| self.stored_pages(id).is_ok_and(|pages| pages.0 == 0))
    }

    /// The name under which it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file, unless it is compressed: then the offsets of the snapshot are not those of the file. Its own
    /// position is never used; read it with `pread`.
    #[must_use]
    pub fn plain_file(&self) -> Option<&File> {
        match &self.bytes {
            Bytes::Plain { file, .. } => Some(file),
            Bytes::Frames(_) => None,
        }
    }

    /// The frames of a compressed snapshot; `None` of a plain file.
    #[must_use]
    pub fn frames(&self) -> Option<&FrameFile> {
        self.bytes.frames()
    }

    /// How long the snapshot is, uncompressed.
    #[must_use]
    pub fn length(&self) -> ByteLen {
        ByteLen(self.bytes.size())
    }

    /// Where the stream begins in the file.
    #[must_use]
    pub fn base(&self) -> FileOffset {
        self.base
    }

    /// Machine type, capabilities and what else a destination must agree to.
    #[must_use]
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// The RAM blocks, in the order of the file. Pages are 4 KiB.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where a block is in the file.
    #[must_use]
    pub fn block(&self, block: BlockId) -> Option<&BlockFile> {
        self.blocks.get(block.0 as usize)
    }

    /// Where a page is in the file, if it is stored.
    #[must_use]
    pub fn page_offset(&self, block: BlockId, page: PageIndex) -> Option<FileOffset> {
        self.block(block).filter(|block| block.in_file)?.pages_offset.checked_add(page.byte_offset())
    }

    /// What is known of the pages from `first` on without reading: the equal ones at the beginning, at most `most`. Its
    /// cost does not grow with RAM. `None` if nothing is known yet, or nothing can be.
    #[must_use]
    pub fn known_run(&self, block: BlockId, first: PageIndex, most: PageCount) -> Option<FileRun> {
        if self.no_bitmaps {
            return None;
        }
        let bitmap = self.bitmaps.get(block.0 as usize)?.as_ref()?;
        bitmap.known(first, most)
    }

    /// Like [`known_run`](Snapshot::known_run), but reads as much of the bitmap as it takes and was not read before:
    /// 4 KiB of bitmap are 128 MiB of RAM.
    ///
    /// # Errors
    /// If there is no such page, the bitmap can't be read or can't be right, or the block has none.
    pub fn load_run(&self, block: BlockId, first: PageIndex, most: PageCount) -> Result<FileRun, PageError> {
        let path = || self.path.clone();
        let Some(ram) = self.layout.get(block).filter(|ram| first.0 < ram.pages().0) else {
            return Err(PageError::NoSuchPage { path: path(), block, page: first });
        };
        if self.no_bitmaps {
            return Err(PageError::NoBitmaps { path: path() });
        }
        let Some(bitmap) = self.bitmap(block) else {
            return Err(PageError::NotInFile { path: path(), block: ram.name().to_owned() });
        };
        bitmap.load(&self.watched(), first, most).map_err(|error| self.page_error(block, error))
    }

    /// How many pages of a block are stored; of a block that is not in the file, none. Reads the block's whole bitmap.
    ///
    /// # Errors
    /// If the bitmap can't be read or can't be right.
    pub fn stored_pages(&self, block: BlockId) -> Result<PageCount, PageError> {
        match self.bitmap(block) {
            Some(bitmap) => bitmap.count(&self.watched()).map_err(|error| self.page_error(block, error)),
            None => Ok(PageCount(0)),
        }
    }

    /// The sections and commands of the stream, in order.
    #[must_use]
    pub fn sections(&self) -> &[SectionEntry] {
        &self.sections
    }

    /// The bytes of all device sections after RAM, footers included, up to the end mark of the stream. Of a file that is
    /// not [complete](Snapshot::is_complete), empty or a guess.
    #[must_use]
    pub fn device_state(&self) -> Range<FileOffset> {
        self.devices.clone()
    }

    /// The same with the end mark and the description: what follows RAM in a file, to be copied as it is.
    #[must_use]
    pub fn tail(&self) -> Range<FileOffset> {
        self.devices.start..self.end
    }

    /// The description of the device state, if the file has one.
    #[must_use]
    pub fn vmdesc(&self) -> Option<&VmDesc> {
        self.vmdesc.as_ref()
    }

    /// Whether the stream was read to its end, and is all there. Always so, unless opened with [`Options::damaged`].
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether the bitmaps were never written, so that no page can be looked up.
    #[must_use]
    pub fn lacks_bitmaps(&self) -> bool {
        self.no_bitmaps
    }

    /// What was odd when it was opened. [`diagnose`](Snapshot::diagnose) looks deeper.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// Reads a part of the file: device state, which is a few MiB, or a few pages.
    ///
    /// # Errors
    /// If it can't be read, the file does not have it, or it is more than 1 GiB: a sparse file can claim any length.
    pub fn read(&self, range: Range<FileOffset>) -> io::Result<Vec<u8>> {
        if range.start > range.end || range.end.0 > self.bytes.size() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let length = range.end - range.start;
        if length > MAX_READ {
            let what = format!("{length} bytes at offset {}, more than {MAX_READ} at once", range.start);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let mut bytes = vec![0; length.get()];
        self.bytes.read_exact_at(&mut bytes, range.start.0)?;
        Ok(bytes)
    }

    /// Fills `to` with what the snapshot has at `offset`, compressed or not.
    ///
    /// # Errors
    /// If it can't be read, or ends before.
    pub fn read_exact_at(&self, to: &mut [u8], offset: FileOffset) -> io::Result<()> {
        self.bytes.read_exact_at(to, offset.0)
    }

    /// Where bytes begin, at `offset` or behind it, that are no hole; of a compressed snapshot, that do not stand in a
    /// frame of zeros. `None` if there are none. A file system that knows nothing of holes has none.
    ///
    /// # Errors
    /// If the index of a compressed snapshot can't be read.
    pub fn data_from(&self, offset: FileOffset) -> io::Result<Option<FileOffset>> {
        self.bytes.data_from(offset)
    }

    /// What identified the file when it was opened.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// By what a change of the file is noticed.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.watch
    }

    /// What has changed about the file since it was opened, if anything has.
    ///
    /// # Errors
    /// If the system can't tell.
    pub fn changed(&self) -> io::Result<Option<&'static str>> {
        self.watched().difference()
    }

    pub(crate) fn watched(&self) -> Watched<'_> {
        Watched { file: &self.bytes, opened: &self.identity, watch: self.watch }
    }

    pub(crate) fn bitmap(&self, block: BlockId) -> Option<&Bitmap> {
        self.bitmaps.get(block.0 as usize)?.as_ref()
    }

    pub(crate) fn page_error(&self, block: BlockId, error: BitmapError) -> PageError {
        let path = self.path.clone();
        let name = self.layout.get(block).map(|ram| ram.name().to_owned()).unwrap_or_default();
        match error {
            BitmapError::Io { at, error } => PageError::Io { path, block: name, at, error },
            BitmapError::Changed { what } => PageError::Changed { path, block: name, what },
            BitmapError::BeyondBlock { at } => PageError::BeyondBlock { path, block: name, at },
            BitmapError::BeyondFile { last } => {
                let start = self.block(block).map(|block| block.pages_offset).unwrap_or_default();
                let needed = start.checked_add(ByteLen(last.byte_offset().0.saturating_add(page_units::PAGE_SIZE)));
                let needed = needed.unwrap_or(FileOffset(u64::MAX));
                PageError::BeyondFile { path, block: name, needed, actual: FileOffset(self.bytes.size()) }
            }
        }
    }
}
