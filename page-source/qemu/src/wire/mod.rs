//! What goes over the wire between two QEMUs, in both directions.

pub mod record;
pub mod return_path;
