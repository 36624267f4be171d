//! Sinks that are not memory.

mod flat;
mod outcome;

pub use flat::FlatSink;
