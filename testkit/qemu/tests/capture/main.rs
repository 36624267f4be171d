//! `fastload capture` of real, unmodified QEMUs whose guests write while they are captured.

mod support;
mod trouble;
mod work;
