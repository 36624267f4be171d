//! The memory that is served, filled and frozen: it outlives its load.

use std::io;
use std::sync::atomic::AtomicBool;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, Layout, PageRun};

use super::area::Area;
use super::descriptor::Descriptor;
use super::fill::Fill;
use super::gate;
use super::place::Place;
use super::region::Region;
use super::states::{Entry, State, StateMap};
use super::view::View;
use crate::StartError;
use crate::pause::Pauses;
use crate::stats::{Counters, bump};
use crate::sys::ops;

/// A view with its fill.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) view: View,
    pub(crate) fill: Fill,
    pub(crate) counters: Counters,
    pub(crate) pauses: Pauses,
    /// The kernel can't poison: then nothing may ever be unregistered or closed while it is missing.
    pub(super) cannot_poison: AtomicBool,
}

impl Memory {
    /// In which nothing is there yet.
    pub(crate) fn missing(
        descriptor: Descriptor,
        regions: Vec<Region>,
        layout: &Layout,
        pauses: Pauses,
    ) -> io::Result<Memory> {
        let view = View::new(descriptor, regions, layout);
        let fill = Fill::missing(&view.areas)?;
        Ok(Memory { view, fill, counters: Counters::new(), pauses, cannot_poison: AtomicBool::new(false) })
    }

    /// These pages are there already, before anything is served.
    ///
    /// # Errors
    /// If they are not whole granules of the regions.
    pub(crate) fn is_present(&self, run: PageRun) -> Result<(), StartError> {
        let mut covered = 0;
        for (number, part) in self.view.parts(run) {
            let (area, states) = (self.area(number), self.states(number));
            let from = part.first - area.region.run.first;
            if !from.0.is_multiple_of(area.granule.0) || !part.pages.0.is_multiple_of(area.granule.0) {
                break;
            }
            let first = area.granule_of(part.first);
            for granule in first..first + ByteLen(part.pages.0 / area.granule.0).get() {
                states.claim(granule);
                states.settle(granule, State::Present);
            }
            covered += part.pages.0;
        }
        let whole = covered == run.pages.0;
        whole
            .then_some(())
            .ok_or(StartError::Incomplete("pages that are present must be whole granules of the regions"))
    }

    pub(crate) fn area(&self, number: usize) -> &Area {
        &self.view.areas[number]
    }

    pub(crate) fn states(&self, number: usize) -> &StateMap {
        self.fill.of(number)
    }

    /// Wakes the waiters of some granules: they fault again.
    pub(crate) fn wake(&self, at: Place, granules: usize) {
        let area = self.area(at.area);
        let (addr, len) = (area.addr(at.granule), area.len_of(granules));
        if let Err(error) = self.view.descriptor.wake(addr, len) {
            log::debug!("waking the waiters of {len} bytes at {addr} failed: {error}");
        }
    }

    /// A granule was given back, unless it is being installed. Answers what it was; somebody may wait for content that
    /// was Missing, and has to be woken by the caller.
    pub(crate) fn remove(&self, at: Place) -> Entry {
        let was = self.states(at.area).remove(at.granule);
        if !matches!(was.state, State::InFlight | State::Removed) {
            bump(&self.counters.removed, self.area(at.area).granule.0);
        }
        was
    }

    /// A write to a page of frozen memory, or to one whose protection nobody needs any more. `false` if the address is
    /// in no area.
    pub(crate) fn write_fault(&self, addr: HostAddr) -> bool {
        let place = self.view.locate(addr);
        place.inspect(|&place| self.serve_write(place)).is_some()
    }

    /// As [`write_fault`](Memory::write_fault), for a known place.
    pub(crate) fn serve_write(&self, place: Place) {
        let area = self.area(place.area);
        let gate = self.view.installing();
        let done = match gate::holder(&gate) {
            Some(holder) => holder.write(place),
            None => {
                let (addr, len) = (area.addr(place.granule), area.len_of(1));
                // Any other error: it is being unregistered, and its writer woken.
                ops::write_protect(self.view.descriptor.fd(), addr.0, len.0, false) != Err(Errno::EAGAIN)
            }
        };
        if !done {
            self.view.retry.write(place);
        }
    }
}
