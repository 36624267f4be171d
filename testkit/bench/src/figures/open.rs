//! `open.*`: reading what describes a snapshot must not cost more because the guest is larger.

use std::path::Path;
use std::time::Instant;

use mapped_ram::{Snapshot, Writer};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use vmstate::{Configuration, DeviceWriter, Section};

use super::{Bench, Measured};
use crate::figure::{Figure, Goal};
use crate::pairs::{interleave, percentile};

const SMALL: u64 = 64 << 20;
const LARGE: u64 = 64 << 30;
/// Opens in a round.
const OPENS: usize = 51;

pub(super) fn measure(bench: &Bench) -> Measured {
    let directory = tempfile::tempdir_in(&bench.directory)?;
    let (small, large) = (directory.path().join("small"), directory.path().join("large"));
    write(&small, SMALL)?;
    write(&large, LARGE)?;
    let pairs = interleave(|| open(&large), || open(&small))?;
    let how = "a mapped-ram file of 64 GiB, sparse; floor: one of 64 MiB";
    Ok(vec![Figure::ratio("open.64GiB", "us", &pairs, Goal::AtMost(1.3)).measured(how)])
}

/// A file of a guest of that size, with one stored page in each of 64 places.
fn write(path: &Path, len: u64) -> Measured<()> {
    let layout = Layout::new(vec![RamBlock::new("pc.ram", ByteLen(len), PageSize::SMALL)?])?;
    let writer = Writer::create(path, &Configuration::new("pc"), layout)?;
    for piece in 0..64 {
        let page = PageIndex::at_byte(ByteLen(len / 64 * piece));
        writer.write(PageRun::new(BlockId(0), page, PageCount(1)), &[7; 4096])?;
    }
    let mut devices = DeviceWriter::new(2);
    devices.push(Section::builder("device", 0, 1).u32("value", 7).build()?);
    writer.finish(&devices.finish("pc")?)?;
    Ok(())
}

/// Microseconds to open it, the median of many.
fn open(path: &Path) -> Measured<f64> {
    let mut times = Vec::with_capacity(OPENS);
    for _ in 0..OPENS {
        let start = Instant::now();
        let snapshot = Snapshot::open(path)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
        drop(snapshot);
    }
    Ok(percentile(&mut times, 50))
}
