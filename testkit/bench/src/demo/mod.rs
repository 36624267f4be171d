//! The demo: one guest, restored twice.

pub mod report;
pub mod run;
pub mod timeline;
