//! Guest pages over QEMU's migration wire.
//!
//! - [`serve`]: the source's side of postcopy, for any [`PageSource`](page_source::PageSource).
//! - [`receive`]: a source that reads a plain migration stream, as QEMU's background-snapshot sends it.
//! - [`wire`]: pages as records, and what the destination says; both in both directions.

pub mod receive;
pub mod serve;
pub mod wire;
