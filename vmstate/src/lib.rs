//! QEMU's migration stream.
//!
//! - [`StreamReader`] and [`StreamWriter`]: the framing, on a file or a socket. Reading and writing again gives the
//!   same bytes.
//! - [`ram`]: the records of a RAM section.
//! - [`Configuration`], [`Command`]: typed views of what is between the sections.
//!
//! The layout of RAM in a file is not known here.

mod command;
mod configuration;
mod error;
mod event;
pub mod ram;
mod read;
mod wire;
mod write;

pub use command::{Command, RawCommand};
pub use configuration::{Configuration, ConfigurationSubsection, IGNORE_SHARED, MAPPED_RAM};
pub use error::{StreamError, WriteError};
pub use event::{Event, Located, MAGIC, SectionHeader, VERSION, kind};
pub use read::{MAX_VMDESC, StreamReader};
pub use write::StreamWriter;
