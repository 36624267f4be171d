//! Bringing frozen pages to the sink: those that were written first, then the rest.

use std::sync::atomic::Ordering;

use nix::errno::Errno;
use page_source::{ByteLen, Flow, HostAddr, PAGE_SIZE, PageBytes, PageCount, PageRun, PageSink, is_zero};

use super::frozen::{FrozenError, Shared, Zone};
use super::pool::Copied;
use crate::region::Backing;
use crate::sys::memory::{Scratch, read_granule};
use crate::sys::ops;

/// So many bytes are copied, and released, at a time.
const PIECE: ByteLen = ByteLen(2 << 20);

type Outcome = Result<(), FrozenError>;

/// Delivers everything. Returns when each page was delivered, or at the first error.
pub(crate) fn run(shared: &Shared, sink: &dyn PageSink) -> Outcome {
    let mut buffer = Scratch::new(PIECE).map_err(|error| kernel("a buffer", HostAddr(0), errno_of(&error)))?;
    for (number, zone) in shared.zones.iter().enumerate() {
        let step = ByteLen(PIECE.0 / zone.granule.bytes().0).get();
        let mut at = 0;
        while at < zone.saved.len() {
            written_first(shared, sink, &mut buffer)?;
            let end = (at + step).min(zone.saved.len());
            sweep(shared, sink, number, at..end, &mut buffer)?;
            at = end;
        }
    }
    // What the handlers have claimed is on its way into the pool.
    for (number, zone) in shared.zones.iter().enumerate() {
        for granule in 0..zone.saved.len() {
            while !zone.saved.saved(granule) {
                written_first(shared, sink, &mut buffer)?;
                if zone.saved.claimed(granule) {
                    std::thread::yield_now();
                } else {
                    sweep(shared, sink, number, granule..granule + 1, &mut buffer)?;
                }
            }
        }
    }
    written_first(shared, sink, &mut buffer)
}

fn kernel(what: &'static str, at: HostAddr, errno: Errno) -> FrozenError {
    FrozenError::Kernel { what, at, errno }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// The pages that were copied for their writers, and those whose writers wait.
fn written_first(shared: &Shared, sink: &dyn PageSink, buffer: &mut Scratch) -> Outcome {
    if let Some(outcome) = shared.outcome() {
        return outcome.and(Err(FrozenError::Cancelled));
    }
    for Copied { area, granule, buffer } in shared.pool.drain() {
        let zone = &shared.zones[area];
        let run = zone.pages(granule, 1);
        let flow = deliver(shared, sink, run, &buffer.bytes()[..run.len().get()]);
        shared.pool.give_back(buffer);
        taken(flow)?;
    }
    let parked = std::mem::take(&mut *shared.parked.lock());
    for (number, granule) in parked {
        sweep(shared, sink, number, granule..granule + 1, buffer)?;
        // Saved by somebody else in between: its writer may wait for this.
        release(shared, &shared.zones[number], granule, 1)?;
    }
    Ok(())
}

/// Saves what of some granules is not saved: copies, releases, and then delivers, so that no writer waits for the sink.
fn sweep(
    shared: &Shared,
    sink: &dyn PageSink,
    number: usize,
    granules: std::ops::Range<usize>,
    buffer: &mut Scratch,
) -> Outcome {
    let zone = &shared.zones[number];
    let exists = existing(shared, zone, granules.clone())?;
    let mut at = granules.start;
    while at < granules.end {
        let there = exists[at - granules.start];
        let alike = (at..granules.end).take_while(|&granule| exists[granule - granules.start] == there);
        let claimed = alike.take_while(|&granule| zone.saved.claim(granule)).count();
        if claimed == 0 {
            let holes = (at..granules.end).take_while(|&granule| zone.saved.take_hole(granule)).count();
            zeros(shared, sink, zone.pages(at, holes))?;
            at += holes.max(1);
            continue;
        }
        let run = zone.pages(at, claimed);
        if there {
            let bytes = buffer.bytes_mut(0, run.len().get());
            read_granule(zone.addr(at), bytes);
            shared.settle();
            (at..at + claimed).for_each(|granule| zone.saved.done(granule));
            release(shared, zone, at, claimed)?;
            taken(deliver(shared, sink, run, bytes))?;
        } else {
            shared.settle();
            (at..at + claimed).for_each(|granule| zone.saved.done(granule));
            zeros(shared, sink, run)?;
        }
        at += claimed;
    }
    Ok(())
}

fn zeros(shared: &Shared, sink: &dyn PageSink, run: PageRun) -> Outcome {
    if run.is_empty() {
        return Ok(());
    }
    shared.zero_pages.fetch_add(run.pages.0, Ordering::Relaxed);
    taken(sink.zero(run))
}

/// For each granule, whether it existed at the freeze point, unless it is saved already. A granule that came into being
/// since then was a hole, which its first toucher has marked.
fn existing(shared: &Shared, zone: &Zone, granules: std::ops::Range<usize>) -> Result<Vec<bool>, FrozenError> {
    let per = ByteLen(zone.granule.pages().0).get();
    let run = zone.pages(granules.start, granules.len());
    let pages = if zone.region.backing == Backing::Anonymous || !zone.region.shared {
        let start = zone.addr(granules.start);
        let exist = shared.page_table.exist(start, granules.len() * per);
        exist.map_err(|error| kernel("reading the page table", start, errno_of(&error)))?
    } else {
        shared.in_file(run)
    };
    Ok(pages.chunks(per).map(|pages| pages.iter().any(|&there| there)).collect())
}

fn release(shared: &Shared, zone: &Zone, first: usize, granules: usize) -> Outcome {
    let (addr, len) = (zone.addr(first), zone.len_of(granules));
    loop {
        match ops::write_protect(shared.descriptor.fd(), addr.0, len.0, false) {
            Ok(()) => return Ok(()),
            Err(Errno::EAGAIN) if !shared.stopping() => std::thread::yield_now(),
            Err(errno) => return Err(kernel("releasing pages", addr, errno)),
        }
    }
}

/// Delivers pages, the zero ones among them as such.
fn deliver(shared: &Shared, sink: &dyn PageSink, run: PageRun, bytes: &[u8]) -> Flow {
    let page = ByteLen(PAGE_SIZE).get();
    let mut rest = run;
    let mut bytes = bytes;
    while !rest.is_empty() {
        let zero = is_zero(&bytes[..page]);
        let alike = bytes.chunks_exact(page).take_while(|page| is_zero(page) == zero).count();
        let (now, later) = rest.split_at(PageCount(alike as u64));
        let (content, after) = bytes.split_at(now.len().get());
        if zero {
            shared.zero_pages.fetch_add(now.pages.0, Ordering::Relaxed);
            sink.zero(now)?;
        } else {
            shared.pages.fetch_add(now.pages.0, Ordering::Relaxed);
            sink.data(now, PageBytes::from_slice(content))?;
        }
        (rest, bytes) = (later, after);
    }
    Flow::Continue(())
}

fn taken(flow: Flow) -> Outcome {
    match flow {
        Flow::Continue(()) => Ok(()),
        Flow::Break(error) => Err(error.into()),
    }
}
