//! `fastload load` and `fastload serve` into real, unmodified QEMUs.

mod devices;
mod interrupts;
mod kill;
mod matrix;
mod native;
mod older;
mod record;
mod refuse;
mod serve;
mod stuck;
mod support;
mod switches;

const MIB: u64 = 1 << 20;
