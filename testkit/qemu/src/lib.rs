//! Real QEMU for the tests: a guest of our own, and the harness around it (not published).
//!
//! - [`guest`] makes a freestanding kernel of a few KiB that fills memory, checks it for ever and obeys its serial port.
//! - [`Qemu`] is a QEMU process that belongs to one test: it is killed when it is dropped.
//! - [`Fastload`] is the program under test.

mod blocks;
pub mod guest;
mod program;
mod qemu;
mod ram;
mod start;

pub use program::{Ended, Fastload, fastload};
pub use qemu::{Qemu, QemuError};
pub use ram::{RamDump, first_difference, first_hidden_difference};
pub use start::{Machine, MemoryBackend, Setup};

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
