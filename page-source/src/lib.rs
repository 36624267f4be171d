//! One flow of guest pages: a [`PageSource`] pushes pages into a [`PageSink`].
//!
//! A source knows RAM blocks and pages, never a host address. A sink takes pages in any order, from any thread. What
//! lies between them is a [`Feed`]: the sink's side asks through it ("these pages, now"), and pages arrive. Because
//! nothing is ever *read* synchronously, a local file (answers at once), a network peer (answers late, from its own
//! thread, out of order, with pages nobody asked for) and the frozen memory of a running guest are the same thing to
//! whoever takes the pages.

mod bytes;
mod error;
mod file;
mod flow;
mod pages;
#[cfg(feature = "postcopy")]
pub mod postcopy;
mod pump;
mod sink;
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
