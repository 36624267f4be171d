//! Loading: what a fault needs at once, what the background brings, and how that ends.
//!
//! A [`Load`](load::Load) asks a source for pages, an [`Intake`](intake::Intake) takes in what comes. What handlers call is
//! the load's `Served`; what a freeze of loading memory asks is its `Fetch`.

pub(crate) mod background;
pub(crate) mod completion;
pub(crate) mod discard;
mod exists;
pub(crate) mod fault;
pub(crate) mod fetch;
pub(crate) mod huge;
pub(crate) mod install;
pub(crate) mod intake;
pub(crate) mod latencies;
pub(crate) mod load;
pub(crate) mod pieces;
pub(crate) mod plan;
pub(crate) mod rate;
pub(crate) mod recent_faults;
pub(crate) mod residency;
pub(crate) mod sink;
pub(crate) mod spans;
pub(crate) mod status;
pub(crate) mod supervisor;
pub(crate) mod window;
pub(crate) mod zeros;
