//! The product's side of each comparison.

pub mod memory;
