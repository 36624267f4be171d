//! `background.*`: how fast everything comes in while nobody waits.

use std::fs;
use std::time::{Duration, Instant};

use uffd_engine::{Background, Discards, Handlers};

use super::{Bench, Measured, files};
use crate::figure::{Figure, Goal};
use crate::floor::copy;
use crate::pairs::{PAIRS, interleave};
use crate::product::memory::serve_in;
use crate::sys::{Map, pin, unpin};

const STORED: usize = 1 << 30;
const ZERO: usize = 16 << 30;

pub(super) fn load(bench: &Bench) -> Measured {
    let content = files::stored(bench, STORED)?;
    let product = |threads: usize| -> Measured<f64> {
        let memory = Map::anonymous(STORED)?;
        let cores = [bench.far, bench.near];
        let start = Instant::now();
        let served = serve_in(memory, &content.path, |builder| {
            builder
                .handlers(Handlers::on_cores([bench.near]))
                .background(Background::default().with_threads(threads).on_cores(cores))
                .discards(Discards::Announced)
        })?;
        served.engine.wait()?;
        Ok(throughput(start.elapsed()))
    };
    let floor = || -> Measured<f64> {
        pin(bench.far)?;
        let took = copy::fill(&content.file, STORED);
        unpin()?;
        Ok(throughput(took?))
    };
    let one = interleave(|| product(1), floor)?;
    let two = interleave(|| product(2), || product(1))?;
    Ok(vec![
        Figure::ratio("background.load", "GiB/s", &one, Goal::AtLeast(0.9))
            .measured(format!("1 GiB stored, one thread each, on core {}", bench.far)),
        Figure::ratio("background.threads", "GiB/s", &two, Goal::None)
            .measured(format!("two threads, on cores {} and {}; floor: one", bench.far, bench.near)),
    ])
}

fn throughput(took: Duration) -> f64 {
    STORED as f64 / f64::from(1 << 30) / took.as_secs_f64()
}

pub(super) fn zero(bench: &Bench) -> Measured {
    let content = files::hole(bench, ZERO)?;
    let mut times = Vec::new();
    let mut growths = Vec::new();
    for _ in 0..=PAIRS {
        let memory = Map::anonymous(ZERO)?;
        let before = resident_kib()?;
        let start = Instant::now();
        let served = serve_in(memory, &content.path, |builder| builder.discards(Discards::Announced))?;
        served.engine.wait()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        growths.push((resident_kib()? - before) / 1024.0);
    }
    // The first round warms up: it is the one that loads code and makes the first threads.
    let how = "16 GiB that are one hole, one thread";
    Ok(vec![
        Figure::absolute("background.zero.time", "ms", &times[1..], Goal::AtMost(2.0)).measured(how),
        Figure::absolute("background.zero.resident", "MiB", &growths[1..], Goal::AtMost(1.0)).measured(how),
    ])
}

/// Memory of this process that is resident.
fn resident_kib() -> Measured<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
