//! `fastload load` and `fastload serve` into real, unmodified QEMUs.

mod compressed;
mod devices;
mod interrupts;
mod kill;
mod matrix;
mod monitor;
mod native;
mod older;
mod record;
mod refuse;
mod serve;
mod state;
mod stuck;
mod support;
mod switches;

const MIB: u64 = 1 << 20;
