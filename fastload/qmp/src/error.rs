//! What can go wrong between QEMU and us.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Why QEMU can't be asked, or did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket can't be reached.
    #[error("{}: connecting to QEMU's QMP socket failed: {error}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
    },
    /// There is no greeting: QEMU talks to one client at a time.
    #[error("{}: QEMU does not answer: another program holds this QMP socket, or it is not one", path.display())]
    NoGreeting {
        /// The socket.
        path: PathBuf,
    },
    /// There is a greeting, and then nothing.
    #[error(
        "{}: QEMU greets, but does not answer: it is stopped, or its main thread is held up, perhaps by a page of guest \
         memory that nobody brings",
        path.display()
    )]
    Mute {
        /// The socket.
        path: PathBuf,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, e.g. `GenericError`, `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// QEMU ended, or closed the socket.
    #[error("QEMU closed its QMP socket: it has ended (its standard error says why)")]
    Closed,
    /// There was no answer in time.
    #[error("QEMU did not answer {command} within {limit:?}")]
    Timeout {
        /// The command.
        command: String,
        /// The time limit.
        limit: Duration,
    },
    /// The answer makes no sense.
    #[error("QEMU's answer to {command} is not understood: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong.
        reason: String,
    },
}

impl QmpError {
    /// Whether QEMU does not know the command at all.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, QmpError::Refused { class, .. } if class == "CommandNotFound")
    }
}
