//! `fastload capture` of real, unmodified QEMUs whose guests write while they are captured.

mod killed;
mod support;
mod trouble;
mod work;
