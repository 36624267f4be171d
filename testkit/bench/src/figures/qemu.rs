//! `qemu.*`: what a real, unmodified QEMU has from `fastload load`, and what its guest waits for pages.

mod destination;
mod image;
mod stream;

use std::time::Duration;

use testkit::require::Prerequisite;

use self::destination::Habit;
use self::image::{Image, Rest, place, room};
use self::stream::Stream;
use super::{Bench, Measured};
use crate::figure::{Figure, Goal, median};
use crate::pairs::{interleave, interleave_times, percentile};

const GIB: f64 = (1_u64 << 30) as f64;

/// Whether this can be measured; says why not.
fn possible(figures: &str, gibibytes: u64) -> bool {
    let needed = [Prerequisite::Qemu, Prerequisite::Userfaultfd];
    let lacking = needed.iter().find_map(|what| what.check().err().map(|reason| format!("{what:?}: {reason}")));
    match lacking.map_or_else(|| room(gibibytes << 30), Err) {
        Ok(()) => true,
        Err(reason) => {
            eprintln!("bench: {figures} is not measured: {reason}");
            false
        }
    }
}

/// How long until the guest runs.
pub(super) fn running(bench: &Bench) -> Measured {
    if !possible("qemu.running, qemu.native", 10) {
        return Ok(Vec::new());
    }
    let dir = place(bench, 6 << 30)?;
    let small = Image::make(dir.path(), 256, Rest::Busy)?;
    let middle = Image::make(dir.path(), 1024, Rest::Busy)?;
    let large = Image::make(dir.path(), 4096, Rest::Busy)?;
    // A millisecond is soon lost to somebody else on the machine: the middle one of several counts.
    let several = |image: &Image| -> Measured<f64> {
        Ok(median((0..3).map(|_| image.fastload()).collect::<Measured<Vec<f64>>>()?))
    };
    let growth = interleave(|| several(&large), || several(&small))?;
    let to_middle = interleave(|| several(&middle), || several(&small))?;
    let native = interleave(|| large.native(), || large.fastload())?;
    let how = "all pages stored, from the start of `fastload load` to QEMU's RESUME";
    Ok(vec![
        Figure::ratio("qemu.running.1GiB", "ms", &to_middle, Goal::None).measured(format!("{how}; floor: 256 MiB")),
        Figure::ratio("qemu.running.4GiB", "ms", &growth, Goal::AtMost(1.3)).measured(format!("{how}; floor: 256 MiB")),
        Figure::ratio("qemu.native.4GiB", "ms", &native, Goal::AtLeast(20.0))
            .measured("value: QEMU's own load, from migrate-incoming file: to RESUME; floor: ours, as above"),
    ])
}

/// How fast memory arrives that nobody asked for.
pub(super) fn push(bench: &Bench) -> Measured {
    if !possible("qemu.push", 6) {
        return Ok(Vec::new());
    }
    let dir = place(bench, 3 << 30)?;
    let mut figures = Vec::new();
    for (name, rest, goal, guest) in [
        ("qemu.push", Rest::Idle, Goal::AtLeast(0.8), "is idle"),
        ("qemu.push.busy", Rest::Busy, Goal::None, "takes a core for itself"),
    ] {
        let image = Image::make(dir.path(), 1024, rest)?;
        let stream = Stream::of(&image.path)?;
        // Who shares a core with whom is the scheduler's choice, anew each time.
        let pairs = interleave_times(15, || image.pushed(), || stream.sent(&image))?;
        let pairs: Vec<_> = pairs.iter().map(|(ours, floor)| (ours / GIB, floor / GIB)).collect();
        let how = format!(
            "1 GiB into a QEMU whose guest {guest}, from connecting to its end; floor: the same pages as one stream, \
             ready in memory"
        );
        figures.push(Figure::ratio(name, "GiB/s", &pairs, goal).measured(how));
    }
    Ok(figures)
}

/// What a fault takes while everything else is being pushed.
pub(super) fn demand(bench: &Bench) -> Measured {
    if !possible("qemu.demand", 5) {
        return Ok(Vec::new());
    }
    let dir = place(bench, 2 << 30)?;
    let image = Image::make(dir.path(), 1024, Rest::Busy)?;
    let source = destination::Served::open(&image.path)?;
    let mut figures = Vec::new();
    for (preempt, limit) in [(false, 3.0), (true, 1.5)] {
        for rest in [Duration::ZERO, Duration::from_millis(1)] {
            let p50 = |push: bool| -> Measured<f64> {
                let mut faults = source.faults(bench, Habit { push, preempt, rest })?;
                Ok(percentile(&mut faults, 50) / 1e3)
            };
            let pairs = interleave(|| p50(true), || p50(false))?;
            let often = if rest.is_zero() { "steady" } else { "rare" };
            let channel = if preempt { "preempt" } else { "one_stream" };
            let name = format!("qemu.demand.{channel}.{often}");
            let how = if rest.is_zero() { "one after another" } else { "one each millisecond" };
            let how = format!(
                "p50 of faults, {how}, during the push, guest on core {}, server on {}; floor: without a push",
                bench.near, bench.far
            );
            figures.push(Figure::ratio(name, "us", &pairs, Goal::AtMost(limit)).measured(how));
        }
    }
    Ok(figures)
}
