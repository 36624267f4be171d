//! Who sees the content: the descriptor, the areas, and who may change them when.

use std::ops::Deref as _;
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;

use page_units::{BlockId, ByteLen, HostAddr, Layout, PageIndex, PageRun};
use parking_lot::{Mutex, RwLock};

use super::area::Area;
use super::backing::Backing;
use super::descriptor::Descriptor;
use super::gate::{Alone, Gate, GateLock, Priority};
use super::holder::Holder;
use super::page_table::PageTable;
use super::place::Place;
use super::region::Region;
use super::retry::Retry;
use crate::Features;

/// Regions of one descriptor.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) descriptor: Descriptor,
    pub(crate) areas: Vec<Area>,
    /// The areas by their first address.
    by_address: Vec<(HostAddr, usize)>,
    /// The areas by their first page.
    by_page: Vec<((BlockId, PageIndex), usize)>,
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
    /// Of this process, once it is needed.
    page_table: OnceLock<Option<PageTable>>,
}

impl View {
    pub(crate) fn new(descriptor: Descriptor, regions: Vec<Region>, layout: &Layout) -> View {
        let gated = descriptor.features().contains(Features::EVENT_REMOVE);
        let name = |region: &Region| layout.get(region.run.block).map(|block| block.name().into()).unwrap_or_default();
        let areas: Vec<Area> = regions.into_iter().map(|region| Area::new(region.clone(), name(&region))).collect();
        let mut by_address: Vec<_> = areas.iter().enumerate().map(|(i, area)| (area.region.start, i)).collect();
        by_address.sort_unstable();
        let first = |area: &Area| (area.block(), area.region.run.first);
        let mut by_page: Vec<_> = areas.iter().enumerate().map(|(i, area)| (first(area), i)).collect();
        by_page.sort_unstable();
        View {
            descriptor,
            areas,
            by_address,
            by_page,
            gate: GateLock::default(),
            discarding: RwLock::default(),
            gated,
            handlers: Mutex::default(),
            readers: RwLock::default(),
            retry: Retry::default(),
            page_table: OnceLock::new(),
        }
    }

    /// Held from a claim to the end of its install.
    pub(crate) fn installing(&self) -> Gate<'_> {
        self.gate.shared()
    }

    /// Held while events are read and applied, if there are any.
    pub(crate) fn reading(&self) -> Option<Priority<'_>> {
        self.gated.then(|| self.gate.alone_with_priority())
    }

    /// Held while memory is frozen.
    pub(crate) fn gate_alone(&self) -> Alone<'_> {
        self.gate.alone()
    }

    /// The freeze under way, if there is one.
    pub(crate) fn frozen(&self) -> Option<Arc<dyn Holder>> {
        self.gate.shared().deref().as_ref().filter(|holder| !holder.has_ended()).map(Arc::clone)
    }

    /// Forgets a freeze that has ended, so that neither keeps the other alive.
    pub(crate) fn forget_freeze(&self, ended: &Arc<dyn Holder>) {
        let mut gate = self.gate.alone();
        if gate.as_ref().is_some_and(|held| Arc::ptr_eq(held, ended)) {
            *gate = None;
        }
    }

    /// Whether discards are reported by the kernel.
    pub(crate) fn gated(&self) -> bool {
        self.gated
    }

    pub(crate) fn on_reader_thread(&self) -> bool {
        let me = std::thread::current().id();
        self.readers.read().contains(&me)
    }

    /// This thread reads events from now on.
    pub(crate) fn reads_events(&self) {
        self.readers.write().push(std::thread::current().id());
    }

    /// Lets the regions go: what is missing is ordinary memory then, and its waiters go on.
    pub(crate) fn unregister(&self) {
        for area in &self.areas {
            self.descriptor.let_go(area.region.start, area.region.len());
        }
    }

    /// The granule that holds an address.
    pub(crate) fn locate(&self, addr: HostAddr) -> Option<Place> {
        let after = self.by_address.partition_point(|&(start, _)| start <= addr);
        let (start, area) = *self.by_address.get(after.checked_sub(1)?)?;
        let granule = ByteLen((addr - start).0 / self.areas[area].granule.to_bytes().0).get();
        (granule < self.areas[area].granules).then_some(Place { area, granule })
    }

    /// Whether a granule is in the page table: `None` if this process can't see it.
    pub(crate) fn is_mapped(&self, area: &Area, granule: usize) -> Option<bool> {
        if self.descriptor.foreign() {
            return None;
        }
        let table = self.page_table.get_or_init(|| PageTable::open().ok()).as_ref()?;
        Some(table.has(area.addr(granule), area.region.backing == Backing::Hugetlb))
    }

    /// The parts of a run that lie in areas: each with the number of its area.
    pub(crate) fn parts(&self, run: PageRun) -> impl Iterator<Item = (usize, PageRun)> {
        // Areas do not overlap: those from the last one that begins at or before the run.
        let after = self.by_page.partition_point(|&(first, _)| first <= (run.block, run.first));
        self.by_page[after.saturating_sub(1)..]
            .iter()
            .take_while(move |&&((block, first), _)| (block, first) < (run.block, run.end()))
            .map(move |&(_, number)| (number, self.areas[number].region.run.intersect(run)))
            .filter(|(_, part)| !part.is_empty())
    }
}
