//! `fault.busy`: what a fault costs while the background loader runs.

use std::hint::black_box;
use std::time::Instant;

use uffd_engine::{Background, Discards, Handlers};

use super::{Bench, Measured, files};
use crate::figure::{Figure, Goal};
use crate::floor::fault::scattered;
use crate::pairs::{interleave_times, percentile};
use crate::product::memory::{Served, serve};
use crate::sys::{PAGE, pin, unpin};

const LEN: usize = 512 << 20;
/// Faults measured in a round.
const FAULTS: usize = 4096;
/// One fault in a hundred meets a timer of the machine or not: that varies more than what is measured.
const PAIRS: usize = 21;
/// A touch that took less found the page there.
const FAULT_NANOSECONDS: f64 = 1500.0;

pub(super) fn measure(bench: &Bench) -> Measured {
    let content = files::stored(bench, LEN)?;
    let round = |discards: Discards, background: Background| -> Measured<f64> {
        let served = serve(&content.path, LEN, |builder| {
            builder
                .handlers(Handlers::on_cores([bench.near]))
                .background(background.on_cores([bench.far]))
                .discards(discards)
        })?;
        pin(bench.near)?;
        let mut faults = touch_missing(&served);
        unpin()?;
        if faults.len() < FAULTS / 2 {
            return Err(format!("only {} faults before all was loaded", faults.len()).into());
        }
        Ok(percentile(&mut faults, 99) / 1e3)
    };
    let mut figures = Vec::new();
    // With events a fault waits for the install that is under way, and for whatever interrupts that: no goal.
    for (name, discards, goal, how) in [
        ("fault.busy.p99", Discards::Announced, Goal::AtMost(2.0), "discards announced"),
        ("fault.busy.events.p99", Discards::Events, Goal::None, "discards by events"),
    ] {
        let busy = || round(discards, Background::default());
        let pairs = interleave_times(PAIRS, busy, || round(discards, Background::off()))?;
        let (near, far) = (bench.near, bench.far);
        let how = format!("p99, faults and handler on core {near}, background on core {far}, {how}; floor: without");
        figures.push(Figure::ratio(name, "us", &pairs, goal).measured(how));
    }
    Ok(figures)
}

/// Touches pages far from each other until enough were missing, or none is left.
fn touch_missing(served: &Served) -> Vec<f64> {
    let mut faults = Vec::with_capacity(FAULTS);
    for page in scattered(LEN / PAGE) {
        let start = Instant::now();
        black_box(served.memory.touch(page * PAGE));
        let took = start.elapsed().as_secs_f64() * 1e9;
        if took >= FAULT_NANOSECONDS {
            faults.push(took);
        }
        if faults.len() == FAULTS {
            break;
        }
    }
    faults
}
