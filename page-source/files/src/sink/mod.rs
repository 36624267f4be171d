//! Sinks that are not memory.

mod flat;
mod mapped_ram;
mod outcome;

pub use flat::FlatSink;
pub use mapped_ram::MappedRamSink;
