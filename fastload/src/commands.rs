//! The subcommands, one file each.

pub(crate) mod inspect;

/// Why a command failed: shown as one line.
pub(crate) type Failure = Box<dyn std::error::Error>;
