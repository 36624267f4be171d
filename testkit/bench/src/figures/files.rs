//! Files to load from.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use super::{Bench, Measured};

/// A file that is removed on drop.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) path: tempfile::TempPath,
    pub(super) file: File,
}

/// A file of `len` bytes without a zero page, in the page cache.
pub(super) fn stored(bench: &Bench, len: usize) -> Measured<Content> {
    let content = create(&bench.directory)?;
    let mut writer = BufWriter::with_capacity(1 << 20, &content.file);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..len / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        writer.write_all(&state.to_le_bytes())?;
    }
    writer.flush()?;
    drop(writer);
    // Written back now, so that the disk is idle while something is measured.
    content.file.sync_all()?;
    std::io::copy(&mut File::open(&content.path)?.take(len as u64), &mut std::io::sink())?;
    Ok(content)
}

/// A file of `len` bytes that is one hole.
pub(super) fn hole(bench: &Bench, len: usize) -> Measured<Content> {
    let content = create(&bench.directory)?;
    content.file.set_len(len as u64)?;
    Ok(content)
}

fn create(directory: &Path) -> Measured<Content> {
    let (file, path) = tempfile::NamedTempFile::new_in(directory)?.into_parts();
    Ok(Content { path, file })
}
