//! `live.fault`: how long a writer to frozen memory waits.

use page_units::{BlockId, ByteLen, Layout, PageSize, RamBlock};
use uffd_engine::{FreezeOptions, Freezer, Handlers};

use super::{Bench, Measured};
use crate::figure::{Figure, Goal};
use crate::floor::fault::Cores;
use crate::floor::freeze::{latencies, write_all};
use crate::pairs::{interleave, percentile};
use crate::sys::{Map, PAGE, pin, unpin};

const LEN: usize = 64 << 20;

/// Memory of which every page exists.
fn populated() -> Measured<Map> {
    let memory = Map::anonymous(LEN)?;
    (0..LEN).step_by(PAGE).for_each(|at| memory.put(at, 9));
    Ok(memory)
}

pub(super) fn faults(bench: &Bench) -> Measured {
    let mut figures = Vec::new();
    let mut compare = |name: &str, handler: usize| -> Measured<()> {
        let product = || {
            let memory = populated()?;
            let layout = Layout::new(vec![RamBlock::new("memory", ByteLen::of(LEN), PageSize::SMALL)?])?;
            let run = layout.run_of(BlockId(0)).ok_or("an empty block")?;
            let region = crate::sys::region(&memory, run);
            // The pool takes all, as the floor's does: nothing is written out meanwhile.
            let options =
                FreezeOptions::default().with_pool(ByteLen::of(LEN)).with_handlers(Handlers::on_cores([handler]));
            let frozen = Freezer::prepare(vec![region], layout, &options)?.arm()?;
            pin(bench.near)?;
            let latencies = write_all(&memory);
            unpin()?;
            let served = frozen.handle().stats().write_faults;
            drop(frozen);
            if served < (LEN / PAGE) as u64 {
                return Err(format!("{served} faults were served, of {}", LEN / PAGE).into());
            }
            Measured::Ok(tails(latencies))
        };
        let floor = || {
            let (memory, pool) = (populated()?, populated()?);
            Ok(tails(latencies(&memory, &pool, Cores { faulter: bench.near, handler })?))
        };
        let pairs = interleave(product, floor)?;
        let how = format!(
            "first writes on core {}, handler on core {handler}; floor: a bare loop that copies the page too",
            bench.near
        );
        for (which, goal, pick) in [("p50", Goal::AtMost(1.2), 0), ("p99", Goal::None, 1)] {
            let pairs: Vec<_> = pairs.iter().map(|(product, floor)| (product[pick], floor[pick])).collect();
            figures.push(Figure::ratio(format!("{name}.{which}"), "us", &pairs, goal).measured(&how));
        }
        Ok(())
    };
    compare("live.fault.same_core", bench.near)?;
    if bench.far != bench.near {
        compare("live.fault.other_core", bench.far)?;
    }
    Ok(figures)
}

/// p50 and p99 in microseconds.
fn tails(mut nanoseconds: Vec<f64>) -> [f64; 2] {
    [50, 99].map(|percent| percentile(&mut nanoseconds, percent) / 1e3)
}
