//! Loading: what a fault needs at once, what the background brings, and how that ends.

pub(crate) mod background;
pub(crate) mod fault;
pub(crate) mod huge;
pub(crate) mod install;
pub(crate) mod latencies;
pub(crate) mod recent_faults;
pub(crate) mod sink;
pub(crate) mod spans;
pub(crate) mod status;
pub(crate) mod supervisor;
pub(crate) mod window;
