//! `fault.*`: how long a thread waits for a missing page.

use uffd_engine::{Background, Discards, Handlers, Wait};

use super::{Bench, Measured, files};
use crate::figure::{Figure, Goal};
use crate::floor::fault::{Cores, latencies, touch_all};
use crate::pairs::{PAIRS, interleave_times, percentile};
use crate::product::memory::serve_in;
use crate::sys::{Map, PAGE, pin, unpin};

const LEN: usize = 64 << 20;

/// On one core a pair is over in a tenth of a second, so that any neighbour of this machine shows: there are more.
const QUICK_PAIRS: usize = 25;

pub(super) fn measure(bench: &Bench) -> Measured {
    let content = files::stored(bench, LEN)?;
    let mut figures = Vec::new();
    let mut compare = |name: &str, handler: usize, discards: Discards| -> Measured<()> {
        let cores = Cores { faulter: bench.near, handler };
        let product = || {
            let options = |builder: uffd_engine::Builder| {
                builder
                    .handlers(Handlers::on_cores([handler]).waiting(Wait::Block))
                    .background(Background::off())
                    .discards(discards)
            };
            let served = serve_in(Map::anonymous(LEN)?, &content.path, options)?;
            pin(bench.near)?;
            let latencies = touch_all(&served.memory, LEN / PAGE);
            unpin()?;
            Measured::Ok(tails(latencies))
        };
        let floor = || Ok(tails(latencies(&content.file, LEN, cores)?));
        let times = if handler == bench.near { QUICK_PAIRS } else { PAIRS };
        let pairs = interleave_times(times, product, floor)?;
        let how = format!(
            "faults on core {}, handler blocks on core {handler}, {}",
            bench.near,
            match discards {
                Discards::Announced => "discards announced",
                Discards::Events => "discards by events",
            }
        );
        for (which, goal, pick) in [("p50", Goal::AtMost(1.15), 0), ("p99", Goal::None, 1)] {
            let pairs: Vec<_> = pairs.iter().map(|(product, floor)| (product[pick], floor[pick])).collect();
            figures.push(Figure::ratio(format!("{name}.{which}"), "us", &pairs, goal).measured(&how));
        }
        Ok(())
    };
    compare("fault.same_core", bench.near, Discards::Announced)?;
    compare("fault.same_core.events", bench.near, Discards::Events)?;
    if bench.far != bench.near {
        compare("fault.other_core", bench.far, Discards::Announced)?;
        compare("fault.other_core.events", bench.far, Discards::Events)?;
    }
    Ok(figures)
}

/// p50 and p99 in microseconds.
fn tails(mut nanoseconds: Vec<f64>) -> [f64; 2] {
    [50, 99].map(|percent| percentile(&mut nanoseconds, percent) / 1e3)
}
