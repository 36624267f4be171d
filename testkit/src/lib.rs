//! The parts that the tests of this workspace share. Not published.

pub mod at_call;
pub mod collector;
pub mod faults;
mod few_threads;
pub mod gate;
pub mod guest;
pub mod guest_like;
pub mod hugepages;
pub mod late;
pub mod oracle;
pub mod require;
pub mod samples;
pub mod scratch;
pub mod seed;
pub mod source;
mod sys;

pub use few_threads::few_threads;

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
