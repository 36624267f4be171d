//! Writing a snapshot file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page_units::{BlockId, ByteLen, FileOffset, Layout, PageCount, PageRun};
use parking_lot::Mutex;
use vmstate::ram::{self, RecordWriter};
use vmstate::{Configuration, ConfigurationSubsection, Event, MAPPED_RAM, SectionHeader, StreamWriter, WriteError};
use whole_file::WholeFile;

use crate::header::{BlockHeader, bitmap_len};
use crate::writeback::Writeback;
use crate::written_bitmap::WrittenBitmap;
use crate::{BlockFile, CreateError, OpenError, Snapshot};

/// The number of the RAM section. Not 0, which QEMU gives to what has none yet.
const RAM_SECTION: u32 = 1;

/// Writes a snapshot file, in QEMU's layout: what QEMU's own `-incoming file:` loads.
///
/// Pages may be written by several threads, in any order, any number of times; what was never written is zero. The
/// file has no name (on some file systems, a temporary one) until [`finish`](Writer::finish) publishes it; a writer that
/// is dropped before leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    machine: String,
    layout: Layout,
    blocks: Vec<BlockFile>,
    written: Vec<WrittenBitmap>,
    /// Where the stream continues after the last block's pages.
    ram_end: FileOffset,
    writeback: Writeback,
    unpublished: Mutex<Option<WholeFile>>,
}

impl Writer {
    /// Begins a file that is going to be published as `path`. The capability mapped-ram is added to `configuration`, and
    /// x-ignore-shared is removed: every block of the layout is in the file.
    ///
    /// # Errors
    /// If the file can't be created, or the layout or a name does not fit into it.
    pub fn create(
        path: impl AsRef<Path>,
        configuration: &Configuration,
        layout: Layout,
    ) -> Result<Writer, CreateError> {
        let path = path.as_ref().to_owned();
        let encode = |error| CreateError::Encode { path: path.clone(), error };
        let too_large = || CreateError::TooLarge { path: path.clone() };
        let configuration = for_mapped_ram(configuration);
        let mut pieces = Vec::new();
        let mut blocks = Vec::new();
        let mut bytes = beginning(&configuration, &layout).map_err(encode)?;
        let mut at = FileOffset(0);
        for (_, ram) in layout.iter() {
            let mut out = StreamWriter::new(&mut bytes);
            out.counted_string(ram.name()).map_err(encode)?;
            out.u64(ram.length().0).map_err(encode)?;
            let header_offset = at.checked_add(ByteLen::of(bytes.len())).ok_or_else(too_large)?;
            let header = BlockHeader::at(header_offset, ram.pages()).ok_or_else(too_large)?;
            bytes.extend_from_slice(&header.bytes());
            pieces.push((at, std::mem::take(&mut bytes)));
            at = header
                .pages_offset
                .checked_add(ram.length())
                .filter(|end| i64::try_from(end.0).is_ok())
                .ok_or_else(too_large)?;
            blocks.push(BlockFile {
                header_offset,
                bitmap_offset: header.bitmap_offset,
                bitmap_len: bitmap_len(ram.pages()),
                pages_offset: header.pages_offset,
                guest_address: None,
                in_file: true,
            });
        }
        // With no block at all, the stream goes on right there.
        pieces.push((at, std::mem::take(&mut bytes)));
        let ram_end = pieces.last().map(|(at, bytes)| FileOffset(at.0 + bytes.len() as u64)).unwrap_or_default();
        let written = layout.blocks().iter().map(|ram| WrittenBitmap::new(ram.pages())).collect();

        let unpublished = WholeFile::create(&path)?;
        let opening = |error| CreateError::Io { path: path.clone(), what: "opening it again", error };
        let file = unpublished.file().try_clone().map_err(opening)?;
        for (at, bytes) in &pieces {
            let write = |error| CreateError::Write { path: path.clone(), what: "writing the headers", at: *at, error };
            file.write_all_at(bytes, at.0).map_err(write)?;
        }
        let machine = configuration.machine;
        let unpublished = Mutex::new(Some(unpublished));
        let writeback = Writeback::default();
        Ok(Writer { path, file, machine, layout, blocks, written, ram_end, writeback, unpublished })
    }

    /// The name it will have.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The machine type, which the description of the device state repeats.
    #[must_use]
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// The RAM blocks.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The open file, to be written with `pwrite` where [`data_offset`](Writer::data_offset) says, and nowhere else.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the content of a run belongs; `None` if not all of its pages exist.
    #[must_use]
    pub fn data_offset(&self, run: PageRun) -> Option<FileOffset> {
        if !self.layout.contains(run) {
            return None;
        }
        self.blocks.get(run.block.0 as usize)?.pages_offset.checked_add(run.first.byte_offset())
    }

    /// Records that the content of a run was written, which starts on its way to the disk. Pages that do not exist are
    /// ignored.
    pub fn mark_stored(&self, run: PageRun) {
        if let Some(written) = self.written(run) {
            written.set(run.first, run.pages);
        }
        if let Some(offset) = self.data_offset(run) {
            self.writeback.written(&self.file, offset, run.len());
        }
    }

    /// Records that the pages of a run are zero, whatever was written before. Pages that do not exist are ignored.
    pub fn mark_zero(&self, run: PageRun) {
        if let Some(written) = self.written(run) {
            written.clear(run.first, run.pages);
        }
    }

    /// Writes the content of a run and marks it as stored. `bytes` must be as long as the run.
    ///
    /// # Errors
    /// If the run does not exist, `bytes` has another length, or the system can't write.
    pub fn write(&self, run: PageRun, bytes: &[u8]) -> io::Result<()> {
        let offset = self.data_offset(run).filter(|_| ByteLen::of(bytes.len()) == run.len());
        let offset = offset.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.file.write_all_at(bytes, offset.0)?;
        self.mark_stored(run);
        Ok(())
    }

    fn written(&self, run: PageRun) -> Option<&WrittenBitmap> {
        self.written.get(run.block.0 as usize).filter(|_| self.layout.contains(run))
    }

    /// How many pages of a block are marked as stored.
    #[must_use]
    pub fn stored_pages(&self, block: BlockId) -> PageCount {
        self.written.get(block.0 as usize).map_or(PageCount(0), WrittenBitmap::count)
    }

    /// Writes bitmaps and device state, makes the file durable and publishes it, replacing what had its name. Every
    /// page must have been written before. `device_state` is what follows RAM: device sections with their footers, the
    /// end mark and the description, as [`DeviceWriter`](vmstate::DeviceWriter) makes it or as
    /// [`Snapshot::tail`] of another file has it.
    ///
    /// # Errors
    /// If it was finished before, the system can't write, or `device_state` is not what it should be. Nothing is
    /// published then.
    pub fn finish(&self, device_state: &[u8]) -> Result<(), CreateError> {
        let Some(unpublished) = self.unpublished.lock().take() else {
            return Err(CreateError::Finished { path: self.path.clone() });
        };
        let write = |bytes: &[u8], at: u64, what| {
            let failed = |error| CreateError::Write { path: self.path.clone(), what, at: FileOffset(at), error };
            self.file.write_all_at(bytes, at).map_err(failed)
        };
        let end = end_of_ram().map_err(|error| CreateError::Encode { path: self.path.clone(), error })?;
        write(&end, self.ram_end.0, "ending the RAM section")?;
        let state_at = self.ram_end.0.saturating_add(end.len() as u64);
        write(device_state, state_at, "writing the device state")?;
        // Where no bit was ever set the file has a hole, which reads as zero.
        for (block, written) in self.blocks.iter().zip(&self.written) {
            for (at, bytes) in written.parts() {
                write(&bytes, block.bitmap_offset.0.saturating_add(at.0), "writing a bitmap")?;
            }
        }
        // A file that our own reader refuses is not published.
        Snapshot::open(unpublished.temporary_path())
            .map_err(|error| CreateError::Unreadable(OpenError { path: self.path.clone(), ..error }))?;
        Ok(unpublished.publish()?)
    }
}

/// The configuration of a file that has all of RAM at fixed offsets.
fn for_mapped_ram(configuration: &Configuration) -> Configuration {
    let mut configuration = configuration.without_capability(vmstate::IGNORE_SHARED);
    if !configuration.has_capability(MAPPED_RAM) {
        let capabilities = ConfigurationSubsection::Capabilities(vec![MAPPED_RAM.to_owned()]);
        let list = configuration.subsections.iter_mut().find_map(|subsection| match subsection {
            ConfigurationSubsection::Capabilities(names) => Some(names),
            _ => None,
        });
        match list {
            Some(names) => names.push(MAPPED_RAM.to_owned()),
            None => configuration.subsections.push(capabilities),
        }
    }
    configuration
}

/// Everything in front of the first block.
fn beginning(configuration: &Configuration, layout: &Layout) -> Result<Vec<u8>, WriteError> {
    let mut out = StreamWriter::new(Vec::new());
    out.event(&Event::Header)?;
    out.event(&Event::Configuration(configuration.clone()))?;
    let (name, version) = (ram::SECTION.to_owned(), ram::SECTION_VERSION);
    out.event(&Event::SectionStart(SectionHeader { id: RAM_SECTION, name, instance: 0, version }))?;
    RecordWriter::new().mem_size(&mut out, layout.total())?;
    Ok(out.into_inner())
}

/// Everything between the last block's pages and the devices.
fn end_of_ram() -> Result<Vec<u8>, WriteError> {
    let mut out = StreamWriter::new(Vec::new());
    RecordWriter::new().end(&mut out)?;
    out.event(&Event::Footer { id: RAM_SECTION })?;
    out.event(&Event::SectionEnd { id: RAM_SECTION })?;
    RecordWriter::new().end(&mut out)?;
    out.event(&Event::Footer { id: RAM_SECTION })?;
    Ok(out.into_inner())
}
