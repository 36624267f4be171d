//! Why a file can't be made.

use std::io;
use std::path::PathBuf;

/// Why a file can't be made. One line that names it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WholeFileError {
    /// The name belongs to a device, a FIFO, a socket or a directory, which must not be replaced.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// The name.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{}: {what}: {error}", path.display())]
    Io {
        /// The name.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        error: io::Error,
    },
}

impl WholeFileError {
    pub(crate) fn io(path: impl Into<PathBuf>, what: &'static str, error: io::Error) -> WholeFileError {
        WholeFileError::Io { path: path.into(), what, error }
    }
}
