#![doc = include_str!("../README.md")]

mod error;
mod file;
mod leftover;
mod target;

pub use error::WholeFileError;
pub use file::WholeFile;
pub use target::target;
