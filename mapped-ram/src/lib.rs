//! Snapshot files in QEMU's mapped-ram format: open in the time of their metadata, find a page, write.
//!
//! - [`Snapshot`]: an open file. Its [layout](Snapshot::layout) of RAM blocks, [where](Snapshot::block) they are,
//!   [which pages](Snapshot::load_run) are stored and which are zero, and the [state of its
//!   devices](Snapshot::device).
//! - [`Writer`]: a new file, from any number of threads, that appears whole or not at all.
//! - [`Warning`]: what is odd about a file that can be read nevertheless.
//!
//! A page that the file does not vouch for is an error, never zeros.
//!
//! The format is QEMU's (`docs/devel/migration/mapped-ram.rst`): a migration stream whose list of RAM blocks has, for
//! each block, a header with the place of a bitmap and of the block's pages.

mod bitmap;
mod blocks;
mod cursor;
mod device;
mod diagnose;
mod error;
mod header;
mod identity;
mod open;
mod parse;
mod snapshot;
mod sys;
mod warning;
mod writeback;
mod writer;
mod written_bitmap;

pub use bitmap::FileRun;
pub use blocks::BlockFile;
pub use device::Device;
pub use error::{CreateError, OpenError, OpenErrorKind, PageError};
pub use identity::{Identity, Watch};
pub use open::Options;
pub use snapshot::Snapshot;
pub use warning::Warning;
pub use writer::Writer;

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
