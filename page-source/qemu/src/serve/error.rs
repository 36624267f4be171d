//! Why serving ended early.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::wire::return_path::ReturnPathError;
use page_source::SourceError;

/// Whether the destination had started its guest when serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Started {
    /// It did not have what starts it. The destination ends when its connection does.
    No,
    /// It had what starts it, and had not said yet that its devices are loaded: it may run or not.
    Perhaps,
    /// It was (unless it is to stay paused). It waits for its missing pages when its connection is gone.
    Yes,
}

impl fmt::Display for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Started::No => "before the guest was started",
            Started::Perhaps => "while the guest's devices were loaded",
            Started::Yes => "after the guest had been started",
        })
    }
}

/// Why a destination did not get all of its pages.
///
/// Where [`is_recoverable`](ServeError::is_recoverable) says so the guest is not lost: it waits for its missing pages,
/// and [`Server::resume`](super::Server::resume) brings them.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Nobody listens there, or nobody answers.
    #[error("connecting to {to} failed: {error}")]
    Connect {
        /// The address.
        to: String,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
        /// Whether the guest had been started.
        started: Started,
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
        started: Started,
    },
    /// The connection broke.
    #[error("the connection to QEMU at {to} broke {started}: {reason}")]
    Broken {
        /// The address.
        to: String,
        /// How.
        reason: String,
        /// Whether the guest had been started.
        started: Started,
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
        started: Started,
    },
    /// The destination ended the migration with an error.
    #[error("QEMU at {to} could not complete the migration: it reports error {code}")]
    Refused {
        /// The address.
        to: String,
        /// Its error number.
        code: u32,
        /// Whether the guest had been started.
        started: Started,
    },
    /// The destination is silent where it has to answer.
    #[error(
        "QEMU at {to} does not answer: for {patience:?} it has not said {what} (is it stopped, or does another program \
         listen there?)"
    )]
    Silent {
        /// The address.
        to: String,
        /// What it should have answered.
        what: &'static str,
        /// How long nothing came.
        patience: Duration,
        /// Whether the guest had been started.
        started: Started,
    },
    /// Ended by [`Control::stop`](super::Control::stop).
    #[error("stopped before all memory was sent")]
    Stopped {
        /// Whether the guest had been started.
        started: Started,
    },
}

impl ServeError {
    /// Whether the guest had been started.
    #[must_use]
    pub fn started(&self) -> Started {
        match self {
            ServeError::Connect { started, .. }
            | ServeError::Source { started, .. }
            | ServeError::Broken { started, .. }
            | ServeError::Protocol { started, .. }
            | ServeError::Refused { started, .. }
            | ServeError::Silent { started, .. }
            | ServeError::Stopped { started } => *started,
            ServeError::Encode { .. } => Started::No,
        }
    }

    /// Whether the guest had been started, or may have been: it then waits for its missing pages, and another server can
    /// bring them.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        self.started() != Started::No
    }
}
