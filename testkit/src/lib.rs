//! The parts that the tests of this workspace share. Not published.

pub mod guest;
pub mod hugepages;
pub mod require;
mod sys;
