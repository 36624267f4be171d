//! The subcommands, one file each.

pub(crate) mod capture;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod compress;
pub(crate) mod convert;
pub(crate) mod disks;
pub(crate) mod inspect;
pub(crate) mod load;
pub(crate) mod manual;
pub(crate) mod monitor;
pub(crate) mod repair;
pub(crate) mod resume;
pub(crate) mod serve;
pub(crate) mod serving;
pub(crate) mod view;

/// Why a command failed: shown as one line.
pub(crate) type Failure = Box<dyn std::error::Error>;
