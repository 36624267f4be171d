//! Frozen memory: what guest memory was at one moment, as a source of pages, while the guest runs on.
//!
//! [`Freezer::prepare`] makes everything that can fail before the guest is stopped. [`Freezer::arm`] write-protects
//! what is populated, while no vCPU runs; that is the freeze point. From then on a page that is about to be written is
//! copied away first and its writer let go at once; the other pages are copied in the background and released in large
//! pieces. [`Frozen`] is a [`PageSource`](page_source::PageSource) that pushes each page exactly once, those that are
//! written first.

mod armed;
mod frozen;
mod pages;
mod pool;
mod saver;
mod writes;

pub use armed::{FreezeError, FreezeOptions, Freezer};
pub use frozen::{FreezeStats, Frozen, FrozenError};
