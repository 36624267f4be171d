//! The product's side of each comparison.

pub mod guest;
pub mod memory;
