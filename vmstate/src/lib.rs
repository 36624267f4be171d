//! QEMU's migration stream.
//!
//! - [`StreamReader`] and [`StreamWriter`]: the framing, on a file or a socket. Reading and writing again gives the
//!   same bytes.
//! - [`ram`]: the records of a RAM section.
//! - [`Configuration`], [`Command`]: typed views of what is between the sections.
//! - [`VmDesc`] and [`walk`]: the description of the devices' state, and what it makes of a section's bytes.
//! - [`Section`] and [`DeviceWriter`]: state of our own, encoded the same way.
//!
//! The layout of RAM in a file is not known here.

mod build;
mod command;
mod configuration;
mod desc;
mod device_writer;
mod error;
mod event;
mod globalstate;
mod locate;
pub mod ram;
mod read;
mod sections;
mod value;
mod walk;
mod wire;
mod write;

pub use build::{BuildError, Section, SectionBuilder, StructBuilder};
pub use command::{Command, RawCommand};
pub use configuration::{Configuration, ConfigurationSubsection, IGNORE_SHARED, MAPPED_RAM};
pub use desc::{DescError, DeviceDesc, FieldDesc, Nested, StructDesc, VmDesc};
pub use device_writer::DeviceWriter;
pub use error::{StreamError, WriteError};
pub use event::{Event, Located, MAGIC, SectionHeader, VERSION, kind};
pub use globalstate::GlobalState;
pub use locate::find_vmdesc;
pub use read::{MAX_VMDESC, StreamReader};
pub use sections::{SectionEntry, SectionKind};
pub use value::{Content, Value, ValueError};
pub use walk::{WalkError, walk};
pub use write::StreamWriter;

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
