//! One flow of guest pages: a [`PageSource`] pushes pages into a [`PageSink`].
//!
//! A source knows RAM blocks and pages, never a host address. A sink takes pages in any order, from any thread. What
//! lies between them is a [`Feed`]: the sink's side asks through it ("these pages, now"), and pages arrive. Because
//! nothing is ever *read* synchronously, a local file (answers at once), a network peer (answers late, from its own
//! thread, out of order, with pages nobody asked for) and the frozen memory of a running guest are the same thing to
//! whoever takes the pages.
//!
//! - Sources: [`MappedRam`], [`FlatFile`], and [`Threaded`] around any other.
//! - Sinks: [`MappedRamSink`], [`FlatSink`].
//! - [`pump`] drives a source into a sink, when all pages are wanted and none is urgent.
//!
//! ```
//! use std::sync::Arc;
//! use page_source::{ByteLen, FlatBlock, FlatFile, FlatSink, PageSink, PageSize, PumpOptions, RamBlock, pump};
//!
//! let dir = tempfile::tempdir()?;
//! let (from, to) = (dir.path().join("memory"), dir.path().join("copy"));
//! std::fs::write(&from, vec![7; 8 << 20])?;
//! let blocks = FlatBlock::concatenated(vec![RamBlock::new("ram", ByteLen(8 << 20), PageSize::SMALL)?])?;
//!
//! let source = FlatFile::open(&from, blocks.clone())?;
//! let sink = Arc::new(FlatSink::create(&to, &blocks)?);
//! let pumped = pump(&source, Arc::clone(&sink) as Arc<dyn PageSink>, &PumpOptions::default())?;
//! sink.outcome()?;
//! assert_eq!(pumped.stored.0, 2048);
//! assert_eq!(std::fs::read(&from)?, std::fs::read(&to)?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bytes;
mod error;
mod file;
mod flow;
mod pages;
#[cfg(feature = "postcopy")]
pub mod postcopy;
mod pump;
mod sink;
#[cfg(feature = "stream")]
pub mod stream;
mod sys;
mod threaded;
mod zeros;

pub use bytes::PageBytes;
pub use error::{SinkError, SourceError};
#[cfg(feature = "mapped-ram")]
pub use file::MappedRam;
pub use file::{FlatBlock, FlatFile};
pub use flow::{Content, End, Feed, Flow, PageSink, PageSource, Span, Urgency};
pub use page_units as units;
pub use page_units::*;
pub use pump::{Progress, PumpError, PumpOptions, Pumped, pump};
pub use sink::FlatSink;
#[cfg(feature = "mapped-ram")]
pub use sink::MappedRamSink;
pub use threaded::Threaded;
pub use zeros::is_zero;
