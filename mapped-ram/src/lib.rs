//! Snapshot files in QEMU's mapped-ram format.

mod bitmap;
mod blocks;
mod cursor;
mod diagnose;
mod error;
mod header;
mod identity;
mod open;
mod parse;
mod publish;
mod snapshot;
mod warning;
mod writer;

pub use error::{CreateError, OpenError, OpenErrorKind, PageError};
pub use identity::Identity;
pub use open::Options;
pub use snapshot::{BlockFile, Device, Snapshot};
pub use warning::Warning;
pub use writer::Writer;
