//! A guest of a few hundred bytes: it walks memory, counts, keeps a checksum, and says so.
//!
//! Its machine code is assembled here ([`GuestImage::build`]), so nothing but Rust is needed to make it. It runs in
//! long mode at CPL 0 or CPL 3 ([`Privilege`]), on any number of vCPUs, each with a [`Program`] of its own. All RAM
//! but the first 2 MiB is the *window*: one linear space, whatever gaps lie between the regions, which the page tables
//! map at [`layout::WINDOW`].
//!
//! The counter and the checksum live in registers and in a page of memory ([`Report`]); the guest compares the two in
//! each step and tells when they differ, so a restore that gets either wrong shows at once. After each
//! [`Program::report_every`] steps, and at the end, it writes a [`Signal`] to the port [`layout::PORT`].
//!
//! [`Oracle`] computes the same on the host, in plain Rust, and compares every byte of memory.

mod code;
mod image;
pub mod layout;
mod oracle;
mod program;
mod report;
mod tables;

pub use image::{GuestConfig, GuestImage, Privilege, fill_pages};
pub use oracle::{Oracle, Step, Walker};
pub use program::{Operation, Pattern, Program};
pub use report::{Report, Signal};

/// Guest memory as the tests use it.
pub type Memory<B = ()> = vm_memory::GuestMemoryMmap<B>;
