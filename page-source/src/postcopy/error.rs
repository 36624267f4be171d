//! Why serving ended early.

use std::io;
use std::sync::Arc;

use crate::SourceError;
use crate::postcopy::return_path::ReturnPathError;

/// Why a destination did not get all of its pages.
///
/// Where [`is_recoverable`](ServeError::is_recoverable) says so the guest is not lost: it waits for its missing pages,
/// and [`Server::resume`](super::Server::resume) brings them.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Nobody listens there.
    #[error("connecting to {to} failed: {error}")]
    Connect {
        /// The address.
        to: String,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
    },
    /// What is to be sent first can't be encoded.
    #[error("the migration stream can't be written: {reason}")]
    Encode {
        /// Why.
        reason: String,
    },
    /// The source can't deliver a page.
    #[error("{error}")]
    Source {
        /// Why.
        #[source]
        error: SourceError,
        /// Whether the guest had been started.
        started: bool,
    },
    /// The connection broke.
    #[error("the connection to QEMU at {to} broke {}: {reason}", when(*.started))]
    Broken {
        /// The address.
        to: String,
        /// How.
        reason: String,
        /// Whether the guest had been started.
        started: bool,
    },
    /// The destination does not keep to the protocol.
    #[error("QEMU at {to} broke the protocol: {error}")]
    Protocol {
        /// The address.
        to: String,
        /// How.
        #[source]
        error: ReturnPathError,
        /// Whether the guest had been started.
        started: bool,
    },
    /// The destination ended the migration with an error.
    #[error("QEMU at {to} could not complete the migration: it reports error {code}")]
    Refused {
        /// The address.
        to: String,
        /// Its error number.
        code: u32,
    },
    /// The destination is silent where it has to answer.
    #[error("QEMU at {to} does not answer: {what}")]
    Silent {
        /// The address.
        to: String,
        /// What it should have answered.
        what: &'static str,
    },
    /// Ended by [`Control::stop`](super::Control::stop).
    #[error("stopped before all memory was sent")]
    Stopped {
        /// Whether the guest had been started.
        started: bool,
    },
}

fn when(started: bool) -> &'static str {
    if started { "after the guest had been started" } else { "before the guest was started" }
}

impl ServeError {
    /// Whether the guest had been started: it then waits for its missing pages, and another server can bring them.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        match self {
            ServeError::Source { started, .. }
            | ServeError::Broken { started, .. }
            | ServeError::Protocol { started, .. }
            | ServeError::Stopped { started } => *started,
            _ => false,
        }
    }
}
