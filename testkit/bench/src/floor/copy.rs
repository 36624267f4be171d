//! Filling memory from a mapped file by UFFDIO_COPY, one thread.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use crate::sys::{Map, Uffd};

/// The size of one copy.
const PIECE: usize = 1 << 20;

/// How long it takes to fill `len` bytes of fresh memory from the first `len` of the file, from mapping the file until
/// the last page is in.
///
/// # Errors
/// If a call fails.
pub fn fill(file: &File, len: usize) -> io::Result<Duration> {
    let memory = Map::anonymous(len)?;
    let start = Instant::now();
    let source = Map::file(file, len)?;
    let uffd = Uffd::register(&memory)?;
    for at in (0..len).step_by(PIECE) {
        uffd.copy(memory.address(at), source.address(at), PIECE.min(len - at))?;
    }
    Ok(start.elapsed())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn an_odd_length_is_filled() {
        testkit::require!(Userfaultfd);
        let mut file = tempfile::tempfile().unwrap();
        let len = PIECE + 4096;
        file.write_all(&vec![3; len]).unwrap();
        assert!(fill(&file, len).unwrap() > Duration::ZERO);
        // The second half of a piece lies behind the end: the kernel copies the first and stops.
        assert_eq!(fill(&file, len + PIECE).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
    }
}
