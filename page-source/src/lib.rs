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
//! - [`Collect`] and [`Null`] are sinks that are ready to use.
//! - `conformance` (a feature of that name) checks sources and sinks of one's own.
//! - Sources and sinks that are files are in the crate `page-files`, those that speak with QEMU in `qemu-pages`, and the
//!   sink that is guest memory in `uffd-engine`.
//!
//! # Your own source in 30 lines
//!
//! What a source has to promise stands at [`Pages`], [`PageSource`] and [`Feed`]; [`EndGuard`] says the end for it. This
//! one computes its pages on the thread that asks. `examples/network.rs` has one whose pages come late, over a socket.
//!
//! ```
//! use std::sync::Arc;
//! use page_source::*;
//! use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
//!
//! #[derive(Debug)]
//! struct Numbers(Layout);
//!
//! impl Pages for Numbers {
//!     fn layout(&self) -> &Layout {
//!         &self.0
//!     }
//!     fn content(&self, run: PageRun) -> Span {
//!         Span::new(Content::Stored, self.0.clip(run).pages)
//!     }
//! }
//!
//! impl PageSource for Numbers {
//!     fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
//!         Ok(Box::new(NumbersFeed(EndGuard::new(sink))))
//!     }
//! }
//!
//! #[derive(Debug)]
//! struct NumbersFeed(EndGuard);
//!
//! impl Feed for NumbersFeed {
//!     fn request(&self, run: PageRun, _: Urgency) -> Answer {
//!         for one in run.pieces(PageCount(1)) {
//!             let bytes = [one.first.0 as u8; 4096];
//!             let gone = |_| SourceError::stopped("the sink can't read memory");
//!             if deliver(self.0.sink(), one, PageBytes::from_slice(&bytes), gone).is_break() {
//!                 break;
//!             }
//!         }
//!         Answer::Here
//!     }
//!     fn finish(self: Box<Self>) -> Result<(), SourceError> {
//!         Ok(())
//!     }
//! }
//!
//! // Everything into memory:
//! let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(8 << 20), PageSize::SMALL)?])?;
//! let memory = Collect::new(&layout);
//! let source = Arc::new(Numbers(layout));
//! let pumped = pump(source.clone(), memory.clone(), &PumpOptions::default())?;
//! assert_eq!(pumped.stored, PageCount(2048));
//! assert!(memory.bytes(PageRun::single(BlockId(0), PageIndex(77))).unwrap().iter().all(|byte| *byte == 77));
//!
//! // And does it keep to the contract?
//! # #[cfg(feature = "conformance")]
//! page_source::conformance::Suite::new(|one| conformance::Page::Content(vec![one.first.0 as u8; 4096])).source(source)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bytes;
mod collect;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod feed;
mod one_end;
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
pub use one_end::OneEnd;
pub use page_set::PageSet;
pub use pump::{Progress, PumpError, PumpOptions, Pumped, pump};
pub use shared_feed::SharedFeed;
pub use sink::{End, PageSink, Reply, deliver};
pub use source::{Content, OneShot, PageSource, Pages, Source, Span};
pub use threaded::Threaded;
pub use zeros::{deliver_without_zeros, is_zero};

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
