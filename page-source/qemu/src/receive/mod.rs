//! Plain migration streams: RAM as records in a stream, as QEMU sends it to any destination, and a live snapshot
//! (its capability background-snapshot) to a socket of ours.
//!
//! [`QemuStream`] is a source that pushes what comes, when it comes: nobody has to ask, and asking hurries nothing.
//! Each page may come once. The source ends with [`End::Complete`](page_source::End::Complete) only if the stream came to
//! its own end: every RAM record, all of the device state, the end mark, and a description of the device state that
//! fits it byte for byte. What follows RAM is then in the
//! [`DeviceState`] that [`QemuStream::device_state`] gave.
//!
//! The stream is that of QEMU 6.0 to 11 (docs/devel/migration/main.rst, migration/savevm.c, migration/ram.c). XBZRLE,
//! multifd and postcopy are not understood: they are for streams that go on changing pages, or have several channels.

mod batch;
mod blocks;
mod error;
mod feed;
mod records;
mod source;
mod tail;

pub use error::ReadError;
pub use source::{DeviceState, QemuStream};
