//! Postcopy, QEMU's way of running a guest before its memory is there: the **source's** side of it, for any
//! [`PageSource`](page_source::PageSource).
//!
//! A [`Server`] connects to a QEMU that waits for a migration, hands it the device state, and from then on is a sink:
//! what QEMU asks for it requests from its page source as [`Demand`](page_source::Urgency::Demand), the rest in the
//! background, and whatever the source pushes goes into the socket. Each page goes there at most once, zero pages only
//! if they were asked for, and the end is announced only when every page that is not zero has been sent: QEMU takes
//! whatever is missing then for zero.
//!
//! The server keeps nothing that can't be rebuilt: after a crash, [`Server::resume`] asks the destination which pages
//! it has and goes on.
//!
//! - [`Opening`]: what is sent before the first page.
//!
//! What both directions share, pages on the wire and the return path, is in [`wire`](crate::wire).
//!
//! The protocol is that of QEMU 8.0 to 11 (docs/devel/migration/postcopy.rst, migration/savevm.c, migration/ram.c).

mod address;
mod assembly;
mod bits;
mod channel;
mod connect;
mod credit;
mod error;
mod message;
mod opening;
mod options;
mod order;
mod outlet;
mod pages;
mod pusher;
mod resume;
mod server;
mod session;
mod sink;
mod sys;
mod window;

pub use address::Address;
pub use error::{ServeError, Started};
pub use opening::Opening;
pub use options::{Control, Options, Phase, Progress, Report};
pub use server::Server;
