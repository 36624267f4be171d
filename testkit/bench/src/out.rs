//! Results on standard output.

use std::io::{self, ErrorKind, Write};

/// Writes a text. A reader that has left (`| head`) is no failure.
///
/// # Errors
/// If it can't be written for another reason, such as a full disk.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}
