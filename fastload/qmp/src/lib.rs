//! A small client of QMP, QEMU's machine protocol, over a unix socket or TCP.
//!
//! Answers stay JSON values. A client with one Rust type for each type of the protocol (such as the `qapi` crate)
//! refuses an answer that names a capability or a state newer than itself, and the answers we need, the migration
//! capabilities above all, name new ones in most releases of QEMU: such a client would tie us to one of them.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! let mut qemu = fastload_qmp::Qmp::connect(&fastload_qmp::QmpAddress::parse("/run/vm.qmp".as_ref())?, Duration::from_secs(5))?;
//! let status = qemu.execute("query-status", serde_json::json!({}))?;
//! println!("{}", status["status"]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod address;
mod client;
mod error;
mod facts;
mod out_of_band;
mod processes;
mod reader;

pub use address::QmpAddress;
pub use client::{Event, Qmp};
pub use error::QmpError;
pub use facts::{Capabilities, GuestBlock, ImageFile, MemoryBackend, parse_ram_blocks};
pub use out_of_band::{recover, resume};
pub use processes::{AtSocket, Process};

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
