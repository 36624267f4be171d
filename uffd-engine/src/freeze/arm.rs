//! The freeze point: write-protecting what exists.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, PageRun};
use userfaultfd::RegisterMode;

use super::error::FreezeError;
use super::freeze::Freeze;
use super::owner::Owner;
use super::zone::Zone;
use crate::memory::Memory;
use crate::memory::backing::Backing;
use crate::memory::holder::Fetch;
use crate::sys::ops;

/// How much is protected by one call, from one multiple to the next: what one entry of the second level of a page table
/// covers. Where there is no such entry the kernel does nothing; in a call that covers more, it tells KVM of all of it
/// as soon as one page exists, and KVM then walks its own tables for pages that do not (0.6 ms for 16 GiB).
const STRIDE: ByteLen = ByteLen(1 << 30);

/// The same where the kernel says what exists: little enough that KVM does not walk far for what does not.
const FOUND: ByteLen = ByteLen(128 << 20);

/// Write-protects what exists, with the engine that loads the memory, if one still does.
pub(super) fn arm(freeze: &Arc<Freeze>) -> Result<(), FreezeError> {
    let deadline = Instant::now() + freeze.arm_limit;
    if let Owner::Engine { memory, fetch, heir, handed_over } = &freeze.owner {
        if with_engine(freeze, memory, &**fetch, deadline)? {
            // Its handlers serve the writers.
            freeze.owner.stop();
            return Ok(());
        }
        if let Err(error) = heir {
            return Err(FreezeError::NoHeir(error.to_string()));
        }
        handed_over.store(true, Ordering::Release);
    }
    loop {
        match alone(freeze) {
            // A discard waits for its event to be read, by our own handlers.
            Err(FreezeError::Arm { errno, .. }) if errno.is(Errno::EAGAIN) && Instant::now() < deadline => {
                std::thread::yield_now()
            }
            done => return done,
        }
    }
}

/// Waits until the engine that has loaded the memory has let it go.
///
/// # Errors
/// If it could not load it.
pub(super) fn complete(fetch: &dyn Fetch) -> Result<(), FreezeError> {
    fetch.complete().map_err(|error| FreezeError::Load(Box::new(error)))
}

/// Nothing is being installed at the freeze point, and no discard read: a page is either there, and protected, or its
/// content is that of the source. `false` if the engine is complete: the memory is ordinary memory.
fn with_engine(
    freeze: &Arc<Freeze>,
    memory: &Memory,
    fetch: &dyn Fetch,
    deadline: Instant,
) -> Result<bool, FreezeError> {
    let _no_discards = memory.view.discarding.write();
    loop {
        let mut gate = memory.view.gate_alone();
        if !fetch.running() {
            drop(gate);
            return complete(fetch).map(|()| false);
        }
        if gate.as_ref().is_some_and(|other| !other.has_ended()) {
            return Err(FreezeError::Busy);
        }
        match loading(freeze, memory) {
            Ok(()) => {
                *gate = Some(Arc::<Freeze>::clone(freeze));
                return Ok(true);
            }
            // A discard waits for its event to be read, and the reader waits for the gate.
            Err(FreezeError::Arm { errno, .. }) if errno.is(Errno::EAGAIN) && Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
        drop(gate);
        std::thread::yield_now();
    }
}

/// Memory that is complete.
fn alone(freeze: &Freeze) -> Result<(), FreezeError> {
    let runs = freeze.populated.shared_page_tables().map_err(FreezeError::Populated)?;
    for (zone, runs) in freeze.zones.iter().zip(&runs) {
        register(freeze, zone, RegisterMode::MISSING)?;
        match zone.region.shared {
            true => runs.iter().try_for_each(|&run| protect_run(freeze, zone, run))?,
            false => protect_private(freeze, zone)?,
        }
    }
    freeze.known.freeze(&freeze.zones, runs.concat()).map_err(FreezeError::Populated)
}

/// Memory that is being loaded: what is there the engine has put there.
fn loading(freeze: &Freeze, memory: &Memory) -> Result<(), FreezeError> {
    let mut present = vec![ByteLen(0); freeze.zones.len()];
    for (number, zone) in freeze.zones.iter().enumerate() {
        // Those that it is registered for already stay.
        register(freeze, zone, zone.region.mode())?;
        if !zone.region.shared {
            protect_private(freeze, zone)?;
            continue;
        }
        for (first, granules) in memory.states(number).present() {
            protect(freeze, zone.addr(first), zone.len_of(granules))?;
            present[number] += zone.len_of(granules);
        }
    }
    freeze.known.freeze_loading(&present).map_err(FreezeError::Populated)
}

fn register(freeze: &Freeze, zone: &Zone, mode: RegisterMode) -> Result<(), FreezeError> {
    let (start, length) = (zone.region.start, zone.region.len());
    let registered = freeze.owner.descriptor().register(start, length, mode | RegisterMode::WRITE_PROTECT);
    registered.map_err(|error| FreezeError::Arm { start, length, errno: crate::Errno::from_io(&error) })?;
    zone.registered.store(true, Ordering::Release);
    Ok(())
}

fn once(freeze: &Freeze, start: HostAddr, length: ByteLen) -> Result<(), FreezeError> {
    ops::write_protect(freeze.owner.descriptor().fd(), start.0, length.0, true).map_err(|errno| FreezeError::Arm {
        start,
        length,
        errno: crate::Errno::of(errno),
    })
}

fn protect(freeze: &Freeze, start: HostAddr, length: ByteLen) -> Result<(), FreezeError> {
    let (mut at, end) = (start, start + length);
    while at < end {
        let next = HostAddr((at.0 + 1).next_multiple_of(STRIDE.0)).min(end);
        once(freeze, at, next - at)?;
        at = next;
    }
    Ok(())
}

/// The pages of a run of shared memory, in whole granules.
fn protect_run(freeze: &Freeze, zone: &Zone, run: PageRun) -> Result<(), FreezeError> {
    let (region, granule) = (&zone.region, zone.granule.bytes().0);
    let from = (run.first - region.run.first).to_bytes().0 / granule * granule;
    let to = (run.end() - region.run.first).to_bytes().0.next_multiple_of(granule);
    protect(freeze, region.start + ByteLen(from), ByteLen(to - from))
}

/// All of private memory, as far as the page table goes.
fn protect_private(freeze: &Freeze, zone: &Zone) -> Result<(), FreezeError> {
    let region = &zone.region;
    if region.backing != Backing::Anonymous {
        return protect(freeze, region.start, region.len());
    }
    let (mut at, end) = (region.start, region.range().end);
    while at < end {
        match freeze.populated.page_table().first(at, end) {
            Ok(None) => return Ok(()),
            Ok(Some(first)) => {
                let next = HostAddr((first.0 + 1).next_multiple_of(FOUND.0)).min(end);
                once(freeze, first, next - first)?;
                at = next;
            }
            Err(_) => return protect(freeze, at, end - at),
        }
    }
    Ok(())
}
