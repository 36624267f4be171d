//! Sinks that are not memory.

mod flat;
#[cfg(feature = "mapped-ram")]
mod mapped_ram;
mod outcome;

pub use flat::FlatSink;
#[cfg(feature = "mapped-ram")]
pub use mapped_ram::MappedRamSink;
