//! Reading the metadata of a snapshot file.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use page_units::FileOffset;
use vmstate::{MAGIC, VERSION, kind};

use crate::bytes::Bytes;
use crate::parse::{Parsed, parse};
use crate::{Identity, OpenErrorKind, Watch};

/// How far into a file a stream is looked for, behind a foreign header.
const SEARCH: u64 = 1 << 20;

/// How to open a file.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// Where the stream begins; `None` to look for it in the first MiB.
    pub base: Option<FileOffset>,
    /// Whether to open an incomplete file as far as it goes, with warnings: to look into it, not to load it.
    pub damaged: bool,
    /// By what a change of the file is noticed while it is open.
    pub watch: Watch,
}

impl Options {
    /// Expects the stream at an offset of the file and nowhere else, or looks for it (`None`).
    #[must_use]
    pub fn with_base(self, base: impl Into<Option<FileOffset>>) -> Options {
        Options { base: base.into(), ..self }
    }

    /// Opens an incomplete file as far as it goes.
    #[must_use]
    pub fn with_damaged(self, damaged: bool) -> Options {
        Options { damaged, ..self }
    }

    /// Chooses by what a change of the file is noticed while it is open.
    #[must_use]
    pub fn with_watch(self, watch: Watch) -> Options {
        Options { watch, ..self }
    }
}

/// An open file with what its metadata says.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) bytes: Bytes,
    pub(crate) identity: Identity,
    pub(crate) watch: Watch,
    pub(crate) base: FileOffset,
    pub(crate) parsed: Parsed,
}

/// Opens a file and reads its metadata.
pub(crate) fn open(path: &Path, options: &Options) -> Result<Opened, OpenErrorKind> {
    // Without O_NONBLOCK, opening a pipe would wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(OpenErrorKind::NotAFile);
    }
    let identity = Identity::from_metadata(&metadata);
    let bytes = Bytes::new(file, identity.size)?;
    let base = find_base(&bytes, options.base)?;
    let parsed = parse(&bytes, base, FileOffset(bytes.size()), options.damaged)?;
    Ok(Opened { bytes, identity, watch: options.watch, base, parsed })
}

/// Finds out where the stream begins.
fn find_base(file: &Bytes, given: Option<FileOffset>) -> Result<FileOffset, OpenErrorKind> {
    let (magic, size) = (MAGIC.to_be_bytes(), file.size());
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
