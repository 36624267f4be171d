//! Reading the metadata of a snapshot file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::OnceLock;

use page_units::{FileOffset, Layout};
use vmstate::{Configuration, MAGIC, VERSION, kind};

use crate::bitmap::{Bitmap, pages_between};
use crate::parse::{Parser, Parts};
use crate::{Identity, OpenErrorKind, Snapshot, Warning, Watch};

/// How far a stream may begin behind a foreign header, to be found.
const SEARCH: u64 = 1 << 20;

/// How to open a file.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the stream begins; `None` to look for it in the first MiB.
    pub base: Option<FileOffset>,
    /// Open an incomplete file as far as it goes, with warnings: to look into it, not to load it.
    pub damaged: bool,
    /// By what a change of the file is noticed while it is open.
    pub watch: Watch,
}

pub(crate) fn open(path: &Path, options: &Options) -> Result<Snapshot, OpenErrorKind> {
    // Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(OpenErrorKind::NotAFile);
    }
    let identity = Identity::from_metadata(&metadata);
    let base = find_base(&file, identity.size, options.base)?;
    let mut parser = Parser::new(&file, base, FileOffset(identity.size), options.damaged)?;
    if let Err(error) = parser.run() {
        parser.give_up(error)?;
    }
    let Parts { configuration, blocks, sections, devices, end, vmdesc, complete, ram_ended, warnings } =
        parser.finish()?;
    let size = FileOffset(identity.size);
    let bitmaps = blocks.iter().map(|block| {
        let pages_in_file = pages_between(block.file.pages_offset, size);
        block.file.in_file.then(|| Bitmap::new(block.file.bitmap_offset, block.ram.pages(), pages_in_file))
    });
    let bitmaps = bitmaps.collect();
    let (ram, blocks) = blocks.into_iter().map(|block| (block.ram, block.file)).unzip();
    let layout = Layout::new(ram)?;
    let path = path.to_owned();
    let mut snapshot = Snapshot {
        path,
        file,
        identity,
        watch: options.watch,
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

impl Snapshot {
    /// Whether the bitmaps tell of no page at all, although there are pages in the file. Reads all of them: only for
    /// files whose RAM section never ended.
    fn nothing_stored(&self) -> bool {
        let mut blocks = self.layout.iter().filter(|(id, _)| self.bitmap(*id).is_some()).peekable();
        blocks.peek().is_some() && blocks.all(|(id, _)| self.stored_pages(id).is_ok_and(|pages| pages.0 == 0))
    }
}

/// Where the stream begins.
fn find_base(file: &File, size: u64, given: Option<FileOffset>) -> Result<FileOffset, OpenErrorKind> {
    let magic = MAGIC.to_be_bytes();
    let begins_at = |at: u64| -> io::Result<bool> {
        let mut found = [0; 4];
        Ok(size >= 4 && at <= size - 4 && {
            file.read_exact_at(&mut found, at)?;
            found == magic
        })
    };
    let base = given.unwrap_or_default();
    if begins_at(base.0)? {
        return Ok(base);
    }
    if given.is_none() {
        let mut bytes = vec![0; usize::try_from(size.min(SEARCH)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        // Magic number, version, then a configuration: not just the four letters in somebody's text.
        let start: Vec<u8> =
            magic.iter().chain(&VERSION.to_be_bytes()).chain(&[kind::CONFIGURATION]).copied().collect();
        let found = bytes.windows(start.len()).position(|window| window == start.as_slice());
        if let Some(at) = found.and_then(|at| u64::try_from(at).ok()) {
            return Ok(FileOffset(at));
        }
    }
    Err(OpenErrorKind::NotAStream { base, searched: given.is_none() })
}

/// Whether the file has to have a configuration that says it is of this kind.
pub(crate) fn check_kind(configuration: &Configuration) -> Result<(), OpenErrorKind> {
    if configuration.has_capability(vmstate::MAPPED_RAM) {
        return Ok(());
    }
    Err(OpenErrorKind::PlainStream { machine: configuration.machine.clone() })
}
