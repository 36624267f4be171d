//! The demo and the benchmarks (not published).
//!
//! A [`figure`] is the ratio of what the product takes to what the bare system calls take, both measured in the same
//! run, in turns ([`pairs`]), so that a busy machine slows both. The bare loops are in [`floor`]; they share no code
//! with the product, down to the definitions of the kernel's structures.

pub mod demo;
pub mod figure;
pub mod figures;
pub mod floor;
pub mod out;
pub mod pairs;
pub mod product;
pub mod sys;
