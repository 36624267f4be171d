//! Saving a machine while it runs.
//!
//! The guest stands still only for its device state and for the write-protection of its memory; then it runs on, and
//! its memory is written to the file as it was at that moment, the freeze point.

mod check;
mod error;
mod handle;
mod mappings;
mod options;
mod sink;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mapped_ram::Writer;
use page_source::{OneShot, PageSink};
use page_units::{ByteLen, PageCount};
use uffd_engine::{Engine, Freezer, Frozen};
use vmstate::{Configuration, DeviceWriter, Section};

pub use self::error::LiveError;
pub use self::handle::{LiveProgress, LiveReport, LiveSnapshot};
pub use self::options::{LiveEvent, LiveOptions};
use self::sink::LiveSink;
use super::FIRST_DEVICE;
use crate::ram::FreezeClaim;
use crate::state::Host;
use crate::sys::WritesFail;
use crate::{GuestRam, Machine};

/// What the blackout was spent on.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Blackout {
    /// From the request until no vCPU ran any more.
    pub stop: Duration,
    /// What the caller did meanwhile: see [`LiveOptions::with_drain`].
    pub drain: Duration,
    /// Reading the device state from KVM, after that: the interrupts of I/O that was drained are in it.
    pub state: Duration,
    /// Write-protecting memory. Which pages of shared memory exist exactly is looked up when the guest runs again.
    pub arm: Duration,
    /// All of it: from the request to stop until the vCPUs were let go. No vCPU stood still longer.
    pub total: Duration,
}

/// Takes a snapshot while the guest runs. Returns when it runs again; the file is written from then on, appears at
/// `path` when it is complete and durable, and shows exactly the freeze point.
///
/// Everything that can be checked is checked, and made, before a vCPU stops: the memory, userfaultfd, the file under
/// its temporary name, the free space. vCPUs that did not run before (paused, or stopped by a device) do not run
/// afterwards either.
///
/// The memory must be complete. For a guest whose memory is still being loaded see
/// [`Vm::snapshot_live`](crate::Vm::snapshot_live).
///
/// # What is not caught
/// Writes that go through the guest's memory as it is mapped here are caught, those of the caller's device models
/// too. Not caught are those that go around it: direct I/O and `io_uring` in flight, DMA, `write(2)` to the file behind
/// shared memory, other mappings of that file. Stop and finish those in [`LiveOptions::with_drain`], or refuse there.
///
/// A second mapping in this process through which shared memory can be written is refused by its address
/// ([`LiveError::MappedTwice`]), unless the caller [answers for it](LiveOptions::check_mappings). What is mapped after
/// that was looked up, or in another process, is not seen: the kernel tells nobody who else has a file mapped. Where no
/// other process has to write to the memory, a VMM can have the kernel see to that: a memfd that is sealed with
/// `F_SEAL_FUTURE_WRITE` as soon as it is mapped here, and before anybody else has it, is written to by nobody but through
/// that mapping (fcntl(2)). It can't be given back in parts then ([`GuestRam::discard`] fails).
///
/// As long as the snapshot is not complete, give memory back (a balloon) with [`GuestRam::discard`], which holds that
/// off: the snapshot fails if a bare `madvise` or `fallocate` is seen.
///
/// # Errors
/// If anything fails: the guest goes on as it was, and there is no file, or the one that was there before.
pub fn snapshot_live(
    machine: &dyn Machine,
    host: &Host,
    path: &Path,
    options: &LiveOptions,
) -> Result<LiveSnapshot, LiveError> {
    take(machine, host, path, options, None)
}

/// As [`snapshot_live`], of a guest whose memory `engine` has loaded or is still loading: what is missing is taken straight
/// from the engine's source, and is not brought into the memory for it. The engine goes on serving and loading, and becomes
/// complete only after the snapshot has its pages.
///
/// `path` must not be the file that the memory is still being loaded from: replacing that would take away what is missing.
///
/// # Errors
/// As [`snapshot_live`]; and if some of the memory could not be loaded.
pub fn snapshot_live_loading(
    machine: &dyn Machine,
    engine: &Engine,
    host: &Host,
    path: &Path,
    options: &LiveOptions,
) -> Result<LiveSnapshot, LiveError> {
    match PageCount(engine.stats().poisoned_pages) {
        PageCount(0) => take(machine, host, path, options, Some(engine)),
        poisoned => Err(LiveError::Poisoned(poisoned)),
    }
}

/// As [`snapshot_live`], with the engine that loads the memory, if one does.
fn take(
    machine: &dyn Machine,
    host: &Host,
    path: &Path,
    options: &LiveOptions,
    engine: Option<&Engine>,
) -> Result<LiveSnapshot, LiveError> {
    let begun = Instant::now();
    // In the threads that are started here as well, and that write.
    let _writes = WritesFail::new().map_err(LiveError::Signals)?;
    let ram = machine.ram();
    check::memory(ram)?;
    if options.check_mappings {
        check::mappings(ram)?;
    }
    let claim = FreezeClaim::new(ram).ok_or(LiveError::Busy)?;
    let freezer = freezer(ram, options, engine)?;
    let mut devices = DeviceWriter::new(FIRST_DEVICE);
    devices.push(ram.section()?);
    let configuration = Configuration::new(options.machine.clone());
    let writer = Writer::create(path, &configuration, ram.layout().clone())?;
    if options.check_space {
        check::space(ram, &writer, engine.map_or(PageCount(0), Engine::missing))?;
    }

    let Taken { sections, frozen, blackout } = freeze(machine, host, freezer, options)?;
    options.tell(&LiveEvent::FreezePoint { blackout: blackout.total });

    for section in sections {
        devices.push(section);
    }
    let state = devices.finish(&options.machine)?;
    let length = ByteLen::of(state.len());
    let sink = Arc::new(LiveSink::new(writer, claim, state));
    let handle = frozen.handle();
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).map_err(LiveError::Begin)?;
    Ok(LiveSnapshot::new(feed, handle, sink, Arc::clone(ram), handle::Begun { begun, blackout, state: length }))
}

/// Everything a freeze needs: with the engine, as long as that is loading.
fn freezer(ram: &GuestRam, options: &LiveOptions, engine: Option<&Engine>) -> Result<Freezer, LiveError> {
    let (regions, layout) = (ram.regions(ram.layout())?, ram.layout().clone());
    Ok(match engine {
        Some(engine) => engine.freezer(regions, layout, &options.freeze)?,
        None => Freezer::prepare(regions, layout, &options.freeze)?,
    })
}

/// What was taken while the guest stood still.
struct Taken {
    sections: Vec<Section>,
    frozen: Frozen,
    blackout: Blackout,
}

/// The blackout, and all of it.
fn freeze(machine: &dyn Machine, host: &Host, freezer: Freezer, options: &LiveOptions) -> Result<Taken, LiveError> {
    let begun = Instant::now();
    let mut last = begun;
    let mut lap = || {
        let now = Instant::now();
        now - std::mem::replace(&mut last, now)
    };
    let mut held = machine.hold(options.stop_limit)?;
    let stop = lap();
    // First: I/O that ends raises interrupts, which belong into the state.
    options.drain(machine.ram()).map_err(LiveError::Drain)?;
    let drain = lap();
    let sections = held.sections(host)?;
    let saved = lap();
    let frozen = freezer.arm()?;
    let arm = lap();
    drop(held);
    let blackout = Blackout { stop, state: saved, drain, arm, total: begun.elapsed() };
    Ok(Taken { sections, frozen, blackout })
}
