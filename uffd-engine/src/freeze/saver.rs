//! Bringing frozen pages to the sink: those that were written first, then the rest.

use std::iter::Peekable;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::vec::IntoIter;

use nix::errno::Errno;
use page_source::{PageBytes, PageSink, Reply, SourceError, SourceErrorKind, Subject, is_zero};
use page_units::{ByteLen, HostAddr, PAGE_SIZE, PageCount, PageRun};

use super::error::FrozenError;
use super::freeze::Freeze;
use super::locate::{ContentAt, fetched_at_a_time};
use super::order::{Order, PIECE};
use super::owner::By;
use super::pool::Copied;
use super::zone::Zone;
use crate::memory::holder::FetchError;
use crate::pause::PausePoint;
use crate::sys::memory::Scratch;
use crate::sys::ops;

type Outcome = Result<(), FrozenError>;

/// Delivers everything. Returns when each page was delivered, or at the first error.
pub(crate) fn run(freeze: &Freeze, sink: &dyn PageSink) -> Outcome {
    let buffer = Scratch::new(PIECE).map_err(|error| FrozenError::io("a buffer", HostAddr(0), &error))?;
    freeze.look_up()?;
    let mut saver = Saver { freeze, sink, buffer };
    let mut order = Order::new(&freeze.zones);
    while let Some((number, piece)) = saver.written_first(&mut order)?.or_else(|| order.next()) {
        saver.sweep(number, piece)?;
    }
    // What the handlers have claimed is on its way into the pool; what an engine installs just now will be there.
    for (number, zone) in freeze.zones.iter().enumerate() {
        for granule in 0..zone.saved.len() {
            while !zone.saved.saved(granule) {
                saver.written()?;
                if zone.saved.claimed(granule) {
                    std::thread::yield_now();
                } else if !saver.sweep(number, granule..granule + 1)? {
                    freeze.wait_for_work();
                }
            }
        }
    }
    saver.written()?;
    match freeze.owner.by() {
        By::Freeze(_) => Ok(()),
        // What was loaded since the freeze point was not vouched for yet, nor what was taken here.
        By::Engine { fetch, .. } => fetch.vouch().map_err(FrozenError::Changed),
    }
}

struct Saver<'a> {
    freeze: &'a Freeze,
    sink: &'a dyn PageSink,
    buffer: Scratch,
}

impl Saver<'_> {
    /// The piece in which the page lies that has waited longest for its delivery: a file gets it together with its
    /// neighbours, in one write. Pages are delivered alone if they come faster than pieces, or after their piece.
    fn written_first(&mut self, order: &mut Order) -> Result<Option<(usize, Range<usize>)>, FrozenError> {
        let freeze = self.freeze;
        if freeze.pool.runs_low() {
            self.written()?;
        } else {
            self.parked()?;
        }
        while let Some((number, granule)) = freeze.pool.oldest() {
            let piece = order.around(number, granule);
            if piece.is_some() {
                return Ok(piece);
            }
            self.copies(freeze.pool.take_within(number, &(granule..granule + 1)))?;
        }
        Ok(None)
    }

    /// The pages that were copied for their writers, and those whose writers wait.
    fn written(&mut self) -> Outcome {
        self.copies(self.freeze.pool.drain())?;
        self.parked()
    }

    fn copies(&mut self, copies: Vec<Copied>) -> Outcome {
        let freeze = self.freeze;
        for Copied { area, granule, buffer } in copies {
            let run = freeze.zones[area].pages(granule, 1);
            let reply = deliver(freeze, self.sink, run, buffer.bytes());
            freeze.pool.give_back(buffer);
            taken(self.sink, reply)?;
        }
        Ok(())
    }

    fn parked(&mut self) -> Outcome {
        let freeze = self.freeze;
        if freeze.has_ended() {
            return Err(FrozenError::Cancelled);
        }
        let parked = std::mem::take(&mut *freeze.parked.lock());
        for (number, granule) in parked {
            self.sweep(number, granule..granule + 1)?;
            let zone = &freeze.zones[number];
            if zone.saved.may_change(granule) {
                // Saved by somebody else in between: its writer may wait for this.
                release(freeze, zone, granule, 1)?;
            } else {
                // Somebody is copying it, or the engine has installed it and not said so yet.
                freeze.parked.lock().push((number, granule));
            }
        }
        Ok(())
    }

    /// Saves those of some granules that are not saved, and those that are in the pool: copies, releases, and then
    /// delivers, so that no writer waits for the sink. `false` if the content of some has not come yet.
    fn sweep(&mut self, number: usize, granules: Range<usize>) -> Result<bool, FrozenError> {
        let freeze = self.freeze;
        let zone = &freeze.zones[number];
        let mut copies = freeze.pool.take_within(number, &granules).into_iter().peekable();
        let content = freeze.locate(number, granules.clone())?;
        let mut all = true;
        let mut at = granules.start;
        while at < granules.end {
            let place = content[at - granules.start];
            if place == ContentAt::Memory || copies.peek().is_some_and(|copy| copy.granule == at) {
                let end = self.gather(number, at..granules.end, &mut copies, |at| {
                    content[at - granules.start] == ContentAt::Memory
                })?;
                if end == at && zone.saved.take_hole(at) {
                    zeros(freeze, self.sink, zone.pages(at, 1))?;
                }
                if end == at {
                    freeze.pause(PausePoint::NothingGathered);
                }
                // One that somebody else is at is in the pool soon, or nobody's again: the last look at each granule
                // finds it.
                at = end.max(at + 1);
                continue;
            }
            if place == ContentAt::Soon {
                all = false;
                at += 1;
                continue;
            }
            let most = if place == ContentAt::Source { fetched_at_a_time(zone) } else { granules.len() };
            let alike = (at..granules.end).take(most).take_while(|&at| content[at - granules.start] == place);
            let claimed = alike.take_while(|&granule| zone.saved.claim(granule)).count();
            if claimed == 0 {
                let holes = (at..granules.end).take_while(|&granule| zone.saved.take_hole(granule)).count();
                zeros(freeze, self.sink, zone.pages(at, holes))?;
                at += holes.max(1);
                continue;
            }
            self.save(number, at, claimed, place)?;
            at += claimed;
        }
        Ok(all)
    }

    /// Saves what lies side by side, be it still in memory or in the pool. Returns where that ends.
    fn gather(
        &mut self,
        number: usize,
        granules: Range<usize>,
        copies: &mut Peekable<IntoIter<Copied>>,
        in_memory: impl Fn(usize) -> bool,
    ) -> Result<usize, FrozenError> {
        let freeze = self.freeze;
        let zone = &freeze.zones[number];
        let len = zone.granule.bytes().get();
        let first = granules.start;
        let mut claimed = Vec::new();
        let mut end = first;
        while end < granules.end {
            if let Some(Copied { buffer, .. }) = copies.next_if(|copy| copy.granule == end) {
                self.buffer.bytes_mut((end - first) * len, len).copy_from_slice(buffer.bytes());
                freeze.pool.give_back(buffer);
                end += 1;
                continue;
            }
            let run = (end..granules.end).take_while(|&at| in_memory(at) && zone.saved.claim(at)).count();
            if run == 0 {
                break;
            }
            let (from, to) = (zone.addr(end), self.buffer.bytes_mut((end - first) * len, run * len));
            zone.reading.read(from, to).map_err(|errno| FrozenError::kernel("reading guest memory", from, errno))?;
            claimed.push(end..end + run);
            end += run;
        }
        if end > first {
            freeze.settle();
            claimed.into_iter().flatten().for_each(|granule| zone.saved.done(granule));
            // What came from the pool is released already, which does no harm.
            release(freeze, zone, first, end - first)?;
            let run = zone.pages(first, end - first);
            taken(self.sink, deliver(freeze, self.sink, run, &self.buffer.bytes()[..run.len().get()]))?;
        }
        Ok(end)
    }

    /// Saves claimed granules that are not in memory.
    fn save(&mut self, number: usize, first: usize, granules: usize, place: ContentAt) -> Outcome {
        let freeze = self.freeze;
        let zone = &freeze.zones[number];
        let run = zone.pages(first, granules);
        debug_assert!(matches!(place, ContentAt::Source | ContentAt::Zero), "{place:?}");
        if place == ContentAt::Source {
            self.fetch(number, first, granules)?;
        }
        freeze.settle();
        (first..first + granules).for_each(|granule| zone.saved.done(granule));
        if place == ContentAt::Zero {
            return zeros(freeze, self.sink, run);
        }
        release(freeze, zone, first, granules)?;
        taken(self.sink, deliver(freeze, self.sink, run, &self.buffer.bytes()[..run.len().get()]))
    }

    /// From the source of the engine that loads the memory.
    fn fetch(&mut self, number: usize, first: usize, granules: usize) -> Outcome {
        let By::Engine { memory, fetch } = self.freeze.owner.by() else { return Ok(()) };
        let run = memory.area(number).pages(first, granules);
        let to = self.buffer.bytes_mut(0, run.len().get());
        fetch.fetch(run, to, &|| self.freeze.has_ended()).map_err(|error| match error {
            FetchError::Over => FrozenError::Cancelled,
            FetchError::Source(error) => FrozenError::Source { run, error },
        })?;
        self.freeze.from_source.fetch_add(run.pages.0, Ordering::Relaxed);
        Ok(())
    }
}

fn zeros(freeze: &Freeze, sink: &dyn PageSink, run: PageRun) -> Outcome {
    if run.is_empty() {
        return Ok(());
    }
    freeze.zero_pages.fetch_add(run.pages.0, Ordering::Relaxed);
    taken(sink, sink.zero(run))
}

fn release(freeze: &Freeze, zone: &Zone, first: usize, granules: usize) -> Outcome {
    let (addr, len) = (zone.addr(first), zone.len_of(granules));
    loop {
        match ops::write_protect(freeze.owner.descriptor().fd(), addr.0, len.0, false) {
            Ok(()) => return Ok(()),
            Err(Errno::EAGAIN) if !freeze.has_ended() => std::thread::yield_now(),
            Err(errno) => return Err(FrozenError::kernel("releasing pages", addr, errno)),
        }
    }
}

/// Delivers pages, the zero ones among them as such.
fn deliver(freeze: &Freeze, sink: &dyn PageSink, run: PageRun, bytes: &[u8]) -> Reply {
    let page = ByteLen(PAGE_SIZE).get();
    let mut rest = run;
    let mut bytes = bytes;
    while !rest.is_empty() {
        let zero = is_zero(&bytes[..page]);
        let alike = bytes.chunks_exact(page).take_while(|page| is_zero(page) == zero).count();
        let (now, later) = rest.split_at(PageCount(alike as u64));
        let (content, after) = bytes.split_at(now.len().get());
        if zero {
            freeze.zero_pages.fetch_add(now.pages.0, Ordering::Relaxed);
            match sink.zero(now) {
                Reply::Taken => {}
                reply => return reply,
            }
        } else {
            freeze.pages.fetch_add(now.pages.0, Ordering::Relaxed);
            match sink.data(now, PageBytes::from_slice(content)) {
                Reply::Taken => {}
                reply => return reply,
            }
        }
        (rest, bytes) = (later, after);
    }
    Reply::Taken
}

fn taken(sink: &dyn PageSink, reply: Reply) -> Outcome {
    match reply {
        Reply::Taken => Ok(()),
        Reply::Stop(error) => Err(error.into()),
        // Memory of our own: no sink has a reason to say so.
        Reply::Unreadable(run) => {
            let what = format!("{run}: the sink could not read the pages");
            let error = SourceError::new(SourceErrorKind::Unreadable, Subject::none().run(run), what);
            let _ = sink.failed(run, error.clone());
            Err(FrozenError::Source { run, error })
        }
    }
}
