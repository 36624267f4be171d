//! Real QEMU for the tests: a guest of our own, and the harness around it (not published).
//!
//! - [`guest`] makes a freestanding kernel of 4 KiB that fills memory, checks it for ever and obeys its serial port.
//! - [`Qemu`] is a QEMU process that belongs to one test: it is killed when it is dropped.

pub mod guest;
mod qemu;
mod ram;
mod start;

pub use qemu::{Qemu, QemuError};
pub use ram::{RamDump, first_difference};
pub use start::{Machine, MemoryBackend, Setup};
