//! What all threads of an engine share: the regions with their page states. It is the sink of the pages, and it knows
//! no source, so that a feed that holds it makes no cycle.

use std::io;
use std::sync::Arc;
use std::thread::ThreadId;

use page_units::{ByteLen, HostAddr, Layout, PageCount, PageRun};
use parking_lot::{Mutex, RwLock};

use super::area::Area;
use super::descriptor::Descriptor;
use super::gate::{Alone, Gate, GateLock, InHaste};
use super::place::Place;
use super::region::Region;
use super::states::StateMap;
use crate::freeze::Shared;
use crate::load::huge::Staging;
use crate::load::latencies::Latencies;
use crate::load::recent_faults::RecentFaults;
use crate::load::status::Status;
use crate::load::window::Window;
use crate::options::FailurePolicy;
use crate::pause::Pauses;
use crate::serve::retry::Retry;
use crate::stats::Counters;

#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) descriptor: Descriptor,
    pub(crate) areas: Vec<Area>,
    /// The areas by their first address.
    by_address: Vec<(HostAddr, usize)>,
    pub(crate) status: Status,
    pub(crate) counters: Counters,
    pub(crate) window: Window,
    pub(crate) recent_faults: RecentFaults,
    pub(crate) staging: Staging,
    pub(crate) policy: FailurePolicy,
    pub(crate) pauses: Pauses,
    /// Held shared from a claim to the end of its install; alone while memory is frozen and, with events, while they
    /// are read.
    pub(crate) gate: GateLock,
    /// Held shared by a discard that was announced, and alone, before the gate, while memory is frozen: neither happens
    /// in the middle of the other.
    pub(crate) discarding: RwLock<()>,
    /// Whether events are read.
    gated: bool,
    /// How many handlers there are: those that are about to start, and have not ended.
    pub(crate) handlers: Mutex<usize>,
    /// The threads that read events: an install that must be tried again after an event was read can't wait there.
    readers: RwLock<Vec<ThreadId>>,
    /// Faults that such a thread has to serve again.
    pub(crate) retry: Retry,
    /// When the faults were read that wait for a late source.
    pub(crate) latencies: Latencies,
}

impl Memory {
    pub(crate) fn new(
        descriptor: Descriptor,
        regions: Vec<Region>,
        layout: &Layout,
        staging: Staging,
        policy: FailurePolicy,
        most: PageCount,
        pauses: Pauses,
    ) -> io::Result<Memory> {
        let gated = descriptor.features().contains(crate::Features::EVENT_REMOVE);
        let area = |region: Region| {
            let states = StateMap::new(region.granules())?;
            let name = layout.get(region.run.block).map(|block| block.name().into()).unwrap_or_default();
            Ok(Area { states, granule: region.backing.granule().pages(), name, region })
        };
        let areas = regions.into_iter().map(area).collect::<io::Result<Vec<Area>>>()?;
        let mut by_address: Vec<_> = areas.iter().enumerate().map(|(i, area)| (area.region.start, i)).collect();
        by_address.sort_unstable();
        Ok(Memory {
            descriptor,
            areas,
            by_address,
            status: Status::default(),
            counters: Counters::new(),
            window: Window::new(most),
            recent_faults: RecentFaults::default(),
            staging,
            policy,
            pauses,
            gate: GateLock::default(),
            discarding: RwLock::default(),
            gated,
            handlers: Mutex::default(),
            readers: RwLock::default(),
            retry: Retry::default(),
            latencies: Latencies::default(),
        })
    }

    /// Held from a claim to the end of its install.
    pub(crate) fn installing(&self) -> Gate<'_> {
        self.gate.shared()
    }

    /// Held while events are read and applied, if there are any.
    pub(crate) fn reading(&self) -> Option<InHaste<'_>> {
        self.gated.then(|| self.gate.alone_in_haste())
    }

    /// Held while memory is frozen.
    pub(crate) fn gate_alone(&self) -> Alone<'_> {
        self.gate.alone()
    }

    /// Forgets who has frozen the memory.
    pub(crate) fn forget_freeze(&self, shared: &Arc<Shared>) {
        let mut gate = self.gate.alone();
        if gate.as_ref().is_some_and(|held| Arc::ptr_eq(held, shared)) {
            *gate = None;
        }
    }

    /// Who has frozen the memory, if somebody has.
    pub(crate) fn frozen(&self) -> Option<Arc<Shared>> {
        self.gate.shared().as_ref().filter(|shared| !shared.has_ended()).map(Arc::clone)
    }

    /// Whether discards are reported by the kernel.
    pub(crate) fn gated(&self) -> bool {
        self.gated
    }

    /// How many granules one install covers at most: little where the readers of events wait for it, and least where they
    /// did so lately.
    pub(crate) fn longest_install(&self) -> usize {
        match self.gated() {
            true if self.gate.in_haste_lately() => 4,
            true => 32,
            false => 256,
        }
    }

    pub(crate) fn on_reader_thread(&self) -> bool {
        let me = std::thread::current().id();
        self.readers.read().contains(&me)
    }

    /// This thread reads events from now on.
    pub(crate) fn reads_events(&self) {
        self.readers.write().push(std::thread::current().id());
    }

    /// Lets the regions go: what is missing is ordinary memory then, and whoever waits goes on.
    ///
    /// The kernel wakes the waiters of a range *before* it takes the range out (`userfaultfd_unregister` of Linux
    /// 6.18), and a fault that takes only the lock of its mapping can still begin to wait in between: it would wait
    /// for ever. So they are woken once more, afterwards.
    pub(crate) fn unregister(&self) {
        for area in &self.areas {
            let run = area.region.run;
            if let Err(error) = self.descriptor.unregister(area.region.start, area.region.len()) {
                // The owner unmapped it, or is gone: nobody waits there any more.
                log::debug!("unregistering {run} failed: {error}");
            }
            if let Err(error) = self.descriptor.wake(area.region.start, area.region.len()) {
                log::debug!("waking the waiters of {run} failed: {error}");
            }
        }
    }

    /// The granule that holds an address.
    pub(crate) fn locate(&self, addr: HostAddr) -> Option<Place> {
        let after = self.by_address.partition_point(|&(start, _)| start <= addr);
        let (start, area) = *self.by_address.get(after.checked_sub(1)?)?;
        let granule = ByteLen((addr - start).0 / self.areas[area].granule.to_bytes().0).get();
        (granule < self.areas[area].states.len()).then_some(Place { area, granule })
    }

    /// The parts of a run that lie in areas: each with the number of its area.
    pub(crate) fn parts(&self, run: PageRun) -> impl Iterator<Item = (usize, PageRun)> {
        self.areas
            .iter()
            .enumerate()
            .map(move |(i, area)| (i, area.region.run.intersect(run)))
            .filter(|(_, part)| !part.is_empty())
    }
}
