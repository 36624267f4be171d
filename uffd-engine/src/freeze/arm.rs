//! Write-protecting what exists.

use std::sync::atomic::Ordering;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, PageRun};
use userfaultfd::RegisterMode;

use super::freeze::Shared;
use super::freezer::FreezeError;
use super::owner::Owner;
use crate::memory::backing::Backing;
use crate::sys::ops;

/// So much is protected by one call, from one multiple to the next: what one entry of the second level of a page table
/// covers. Where there is no such entry the kernel does nothing; in a call that covers more, it tells KVM of all of it
/// as soon as one page exists, and KVM then walks its own tables for pages that do not (0.6 ms for 16 GiB).
const STRIDE: ByteLen = ByteLen(1 << 30);

/// The same where the kernel says what exists: little enough that KVM does not walk far for what does not.
const FOUND: ByteLen = ByteLen(128 << 20);

/// All regions.
pub(super) fn arm_all(shared: &Shared, populated: &[PageRun]) -> Result<(), FreezeError> {
    (0..shared.zones.len()).try_for_each(|number| arm(shared, number, populated))
}

fn arm(shared: &Shared, number: usize, populated: &[PageRun]) -> Result<(), FreezeError> {
    let zone = &shared.zones[number];
    let region = &zone.region;
    let refused = |start: HostAddr, length: ByteLen, errno| FreezeError::Arm { start, length, errno };
    // Those that it is registered for already, by an engine, stay.
    let mode = RegisterMode::WRITE_PROTECT
        | match &shared.owner {
            Owner::Freeze { .. } => RegisterMode::MISSING,
            Owner::Engine { .. } => region.mode(),
        };
    shared
        .owner
        .descriptor()
        .register(region.start, region.len(), mode)
        .map_err(|error| refused(region.start, region.len(), Errno::from_raw(error.raw_os_error().unwrap_or(0))))?;
    zone.registered.store(true, Ordering::Release);
    let once = |at: u64, end: u64| {
        ops::write_protect(shared.owner.descriptor().fd(), at, end - at, true)
            .map_err(|errno| refused(HostAddr(at), ByteLen(end - at), errno))
    };
    let protect = |start: HostAddr, len: ByteLen| {
        let end = start.0 + len.0;
        let mut at = start.0;
        while at < end {
            let next = (at + 1).next_multiple_of(STRIDE.0).min(end);
            once(at, next)?;
            at = next;
        }
        Ok(())
    };
    if region.backing == Backing::Anonymous {
        let (mut at, end) = (region.start, region.range().end);
        while at < end {
            match shared.page_table.first(at, end) {
                Ok(None) => return Ok(()),
                Ok(Some(first)) => {
                    let next = (first.0 + 1).next_multiple_of(FOUND.0).min(end.0);
                    once(first.0, next)?;
                    at = HostAddr(next);
                }
                Err(_) => return protect(at, end - at),
            }
        }
        return Ok(());
    }
    if !region.shared {
        return protect(region.start, region.len());
    }
    if let Owner::Engine { memory, .. } = &shared.owner {
        // What it has installed since the caller looked at the file is there too.
        let states = memory.states(number);
        for (first, granules) in states.present() {
            protect(zone.addr(first), zone.len_of(granules))?;
        }
    } else {
        let granule = zone.granule.bytes().0;
        for run in populated {
            let here = run.intersect(region.run);
            if here.is_empty() {
                continue;
            }
            let from = (here.first - region.run.first).to_bytes().0 / granule * granule;
            let to = (here.end() - region.run.first).to_bytes().0.next_multiple_of(granule);
            protect(region.start + ByteLen(from), ByteLen(to - from))?;
        }
    }
    shared.note_populated(populated);
    Ok(())
}
