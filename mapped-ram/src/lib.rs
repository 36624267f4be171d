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
//! ```
//! use mapped_ram::{FileRun, Snapshot, Writer};
//! use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
//! use vmstate::{Configuration, DeviceWriter, Section};
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("guest.snap");
//! // 64 MiB of RAM, of which two pages are not zero, and the state of one device.
//! let ram = RamBlock::new("ram", ByteLen(64 << 20), PageSize::SMALL)?;
//! let writer = Writer::create(&path, &Configuration::new("my-vmm"), Layout::new(vec![ram])?)?;
//! writer.write(PageRun::new(BlockId(0), PageIndex(3), PageCount(2)), &[7; 8192])?;
//! let mut devices = DeviceWriter::new(2);
//! devices.push(Section::builder("cpu", 0, 1).u64("rip", 0xfff0).build()?);
//! writer.finish(&devices.finish("my-vmm")?)?;
//!
//! let snapshot = Snapshot::open(&path)?;
//! let all = PageCount(u64::MAX);
//! assert_eq!(snapshot.load_run(BlockId(0), PageIndex(0), all)?, FileRun::Zero(PageCount(3)));
//! assert_eq!(snapshot.load_run(BlockId(0), PageIndex(3), all)?, FileRun::Stored(PageCount(2)));
//! let cpu = snapshot.device("cpu", 0)?.ok_or("no such device")?;
//! assert_eq!(cpu.decode()?.field("rip")?.as_u64()?, 0xfff0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The format is QEMU's (`docs/devel/migration/mapped-ram.rst`): a migration stream whose list of RAM blocks has, for
//! each block, a header with the place of a bitmap and of the block's pages.

mod bitmap;
mod blocks;
mod bytes;
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
