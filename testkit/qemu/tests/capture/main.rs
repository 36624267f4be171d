//! `fastload capture` of real, unmodified QEMUs whose guests write while they are captured.

mod hook;
mod killed;
mod promise;
mod support;
mod trouble;
mod work;
