//! Loading all of a file before the guest may run: one thread, reads of 1 MiB, from the page cache.

use std::fs::File;
use std::io;

use crate::sys::Map;

/// The size of one read.
const PIECE: usize = 1 << 20;

/// Reads `len` bytes from `offset` on to `at` in `memory`.
///
/// # Errors
/// If the file can't be read.
pub fn load(memory: &Map, at: usize, file: &File, offset: u64, len: usize) -> io::Result<()> {
    for piece in (0..len).step_by(PIECE) {
        memory.read_from(file, at + piece, offset + piece as u64, PIECE.min(len - piece))?;
    }
    Ok(())
}
