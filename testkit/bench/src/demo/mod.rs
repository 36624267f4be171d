//! The demo: one guest, saved while it runs and when it has stopped, and restored.

mod live;
pub mod report;
pub mod run;
pub mod timeline;
