//! Sources and sinks of guest pages that are local files.
//!
//! | | source | sink |
//! |---|---|---|
//! | QEMU's mapped-ram snapshot, plain or (as a source) compressed | [`MappedRam`] | [`MappedRamSink`] |
//! | flat memory (Firecracker, Cloud Hypervisor) | [`FlatFile`] | [`FlatSink`] |
//!
//! A source maps its file and watches it: pages go to the sink by address, user code never reads the mapping, and a file
//! that changes under a guest fails closed. A sink writes a file that becomes visible as a whole, or not at all.
//!
//! ```
//! use std::sync::Arc;
//! use page_files::{FlatBlock, FlatFile, FlatSink};
//! use page_source::{PageSink, PumpOptions, pump};
//! use page_units::{ByteLen, PageSize, RamBlock};
//!
//! let dir = tempfile::tempdir()?;
//! let (from, to) = (dir.path().join("memory"), dir.path().join("copy"));
//! std::fs::write(&from, vec![7; 8 << 20])?;
//! let blocks = FlatBlock::concatenated(vec![RamBlock::new("ram", ByteLen(8 << 20), PageSize::SMALL)?])?;
//!
//! let source = FlatFile::open(&from, blocks.clone())?;
//! let sink = Arc::new(FlatSink::create(&to, &blocks)?);
//! let pumped = pump(Arc::new(source), Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default())?;
//! sink.publish()?;
//! assert_eq!(pumped.stored.0, 2048);
//! assert_eq!(std::fs::read(&from)?, std::fs::read(&to)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod extents;
mod feed;
mod flat;
mod frames;
mod holes;
mod mapped_file;
mod mapped_ram;
mod places;
mod readahead;
mod sink;
mod sys;

pub use ::mapped_ram::Watch;
pub use flat::{FlatBlock, FlatFile, FlatOptions};
pub use mapped_ram::MappedRam;
pub use sink::{FlatSink, MappedRamSink};
