//! One flow of guest pages: a [`PageSource`] pushes pages into a [`PageSink`].
//!
//! A source knows RAM blocks and pages, never a host address. A sink takes pages in any order, from any thread. What
//! lies between them is a [`Feed`]: the sink's side asks through it ("these pages, now"), and pages arrive. Because
//! nothing is ever *read* synchronously, a local file (answers at once), a network peer (answers late, from its own
//! thread, out of order, with pages nobody asked for) and the frozen memory of a running guest are the same
//! thing to a sink.
//!
//! - [`pump`] drives a source into a sink, when all pages are wanted and none is urgent.
//! - [`Threaded`] lets any source answer from threads of its own.
//! - Sources and sinks that are files are in the crate `page-files`, those that speak with QEMU in `qemu-pages`, and the
//!   sink that is guest memory in `uffd-engine`.

mod bytes;
mod collect;
mod error;
mod feed;
mod page_set;
mod pump;
mod shared_feed;
mod sink;
mod source;
mod sys;
mod threaded;
mod zeros;

pub use bytes::PageBytes;
pub use collect::{Collect, Counted, Null};
pub use error::{SinkError, SourceError, SourceErrorKind, Subject};
pub use feed::{Answer, EndGuard, Feed, Urgency};
pub use page_set::PageSet;
pub use pump::{Progress, PumpError, PumpOptions, Pumped, pump};
pub use shared_feed::SharedFeed;
pub use sink::{End, PageSink, Reply};
pub use source::{Content, OneShot, PageSource, Pages, Source, Span};
pub use threaded::Threaded;
pub use zeros::{deliver_without_zeros, is_zero};

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
