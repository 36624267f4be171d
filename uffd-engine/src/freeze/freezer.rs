//! Everything a freeze needs, made before the guest is stopped.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{Builder as Thread, JoinHandle};

use page_units::{ByteLen, Layout};

use super::arm;
use super::error::{FreezeError, FrozenError};
use super::freeze::Freeze;
use super::frozen::{FreezeHandle, Frozen};
use super::known::Known;
use super::owner::{Own, Owner};
use super::pool::Pool;
use super::populate::Populated;
use super::saved::Saved;
use super::writers;
use super::zone::Zone;
use crate::memory::Memory;
use crate::memory::backing::Backing;
use crate::memory::holder::Fetch;
use crate::memory::region::{self, Region};
use crate::serve::placement::check_cores;
use crate::sys::abi::Features;
use crate::sys::ksm;
use crate::sys::read::Reading;
use crate::{Handlers, OpenError, StartError};

/// How memory is frozen.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FreezeOptions {
    /// How much memory the copies take of pages whose writers went on, and that are not written out yet. When it is full,
    /// writers wait.
    pub pool: ByteLen,
    /// The threads that serve write faults.
    pub handlers: Handlers,
}

impl Default for FreezeOptions {
    /// A pool of 32 MiB, one handler.
    fn default() -> FreezeOptions {
        FreezeOptions { pool: ByteLen(32 << 20), handlers: Handlers::default() }
    }
}

impl FreezeOptions {
    /// Sets how much memory the copies of pages take at most.
    #[must_use]
    pub fn with_pool(mut self, pool: ByteLen) -> FreezeOptions {
        self.pool = pool;
        self
    }

    /// Sets the threads that serve write faults.
    #[must_use]
    pub fn with_handlers(mut self, handlers: Handlers) -> FreezeOptions {
        self.handlers = handlers;
        self
    }
}

/// Everything a freeze needs, made before the guest is stopped.
#[derive(Debug)]
pub struct Freezer {
    freeze: Arc<Freeze>,
    threads: Vec<JoinHandle<()>>,
}

impl Freezer {
    /// Checks the regions, and makes the descriptor, the pool and the threads. All regions must be of one granule; shared
    /// ones need their [file](Region::with_file).
    ///
    /// Private memory is taken out of KSM (`MADV_UNMERGEABLE`), which drops the write protection of what it merges; it goes
    /// back at the end if that is the rule of the process (`PR_SET_MEMORY_MERGE`). Memory that was made mergeable by
    /// `madvise` stays out: its owner may call that again then, and not before.
    ///
    /// # Errors
    /// If anything is missing. The memory is as it was then.
    pub fn prepare(regions: Vec<Region>, layout: Layout, options: &FreezeOptions) -> Result<Freezer, FreezeError> {
        region::check(&regions, &layout)?;
        if regions.iter().any(|region| region.foreign) {
            return Err(FreezeError::Foreign);
        }
        check_cores(options.handlers.cores.iter().flatten())?;
        let own = Own::new(features(&regions), options.handlers.cores.len())?;
        Freezer::new(Owner::Freeze(own), regions, layout, options)
    }

    fn new(
        owner: Owner,
        regions: Vec<Region>,
        layout: Layout,
        options: &FreezeOptions,
    ) -> Result<Freezer, FreezeError> {
        check(&regions)?;
        let granule = regions.first().map_or(Backing::Anonymous, |region| region.backing).granule();
        let buffers = ByteLen(options.pool.0 / granule.bytes().0).get();
        let pool = Pool::new(buffers, granule.bytes()).map_err(system("the pool of copied pages"))?;
        let populated = Populated::new(&regions).map_err(system("/proc/self/pagemap"))?;
        populated.prepare().map_err(system("a second mapping of the memory's file"))?;
        let known = Known::new(&regions).map_err(system("the memory's file"))?;
        for region in &regions {
            unmerge(region)?;
        }
        let zones = regions.into_iter().map(zone).collect::<io::Result<_>>();
        let zones = zones.map_err(system("memory for the page states"))?;
        let freeze = Freeze::new(owner, zones, layout, pool, (populated, known));
        let freeze = Arc::new(freeze.map_err(|errno| system("a page of zeros")(errno.into()))?);
        let mut freezer = Freezer { freeze, threads: Vec::new() };
        if freezer.freeze.owner.own().is_some() {
            for (number, &cpu) in options.handlers.cores.iter().enumerate() {
                let freeze = Arc::clone(&freezer.freeze);
                let thread = Thread::new().name(format!("uffd-write-{number}"));
                let thread = thread.spawn(move || writers::run(&freeze, number, cpu));
                freezer.threads.push(thread.map_err(system("a thread"))?);
            }
        }
        Ok(freezer)
    }

    /// Calls `at` at each [`PausePoint`](crate::pause::PausePoint) of frozen memory, on the thread that reaches it. For tests.
    #[cfg(feature = "pause-points")]
    #[must_use]
    pub fn pauses(self, at: impl Fn(crate::pause::PausePoint) + Send + Sync + 'static) -> Freezer {
        self.freeze.pauses.get_or_init(|| crate::pause::Pauses(Arc::new(at)));
        self
    }

    /// Write-protects what is populated. That moment is the freeze point; the caller has stopped everything that writes
    /// to the memory: vCPUs, device models, and I/O in flight that goes around the page tables (direct I/O,
    /// `io_uring`, DMA, other mappings of the same memory), which nothing here could catch.
    ///
    /// It costs the time of the write-protection and little more: which pages of shared memory exist is looked up exactly
    /// when the frozen memory is [started](Frozen), and the guest runs again.
    ///
    /// # Errors
    /// If the kernel refuses, or the engine that loads the memory has failed. The memory is as it was then.
    pub fn arm(mut self) -> Result<Frozen, FreezeError> {
        let threads = std::mem::take(&mut self.threads);
        let mut frozen = Frozen { handle: FreezeHandle(Arc::clone(&self.freeze)), threads };
        match arm::arm(&self.freeze) {
            Ok(()) => Ok(frozen),
            Err(error) => {
                frozen.release();
                Err(error)
            }
        }
    }
}

/// What a freeze needs of a descriptor of its own.
fn features(regions: &[Region]) -> Features {
    let of = |region: &Region| region.backing.features() | needs(region);
    regions.iter().map(of).fold(Features::EVENT_REMOVE, Features::union)
}

/// What freezing needs of the kernel besides.
fn needs(region: &Region) -> Features {
    match region.backing {
        Backing::Anonymous => Features::PAGEFAULT_FLAG_WP,
        Backing::Memfd | Backing::Hugetlb => Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM,
    }
}

/// What freezing needs besides while an engine loads: pages that are in a file already are mapped write-protected, with
/// `UFFDIO_CONTINUE_MODE_WP`. It has no bit of its own; this one came with the same Linux, and is not asked for.
fn needs_loading(region: &Region) -> Features {
    if region.mode().contains(userfaultfd::RegisterMode::MINOR) { Features::WP_UNPOPULATED } else { Features::empty() }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |error| StartError::System { what, error }
}

/// Refuses what can't be frozen exactly.
fn check(regions: &[Region]) -> Result<(), StartError> {
    let granule = regions.first().map_or(Backing::Anonymous, |region| region.backing).granule();
    if regions.iter().any(|region| region.backing.granule() != granule) {
        return Err(StartError::Incomplete("regions of different page sizes are not frozen together"));
    }
    for region in regions {
        let reason = match (region.shared, region.backing) {
            (true, _) if region.file.is_none() => {
                "shared memory can't be frozen without its file, which tells what pages there are: see Region::with_file"
            }
            (false, Backing::Memfd) => {
                "a private mapping of a file can't be frozen: what nobody has touched there changes with the file"
            }
            _ => continue,
        };
        return Err(StartError::Region { start: region.start, length: region.len(), reason: reason.into() });
    }
    Ok(())
}

fn unmerge(region: &Region) -> Result<(), FreezeError> {
    if !region.may_be_merged() {
        return Ok(());
    }
    let (start, length) = (region.start, region.len());
    ksm::unmerge(start, length).map_err(|error| FreezeError::Mergeable { start, length, error })
}

fn zone(region: Region) -> io::Result<Zone> {
    let saved = Saved::new(region.granules())?;
    let file = region.file.as_ref().filter(|_| region.shared);
    let reading = Reading::of(file.map(|(file, _)| &**file));
    Ok(Zone { saved, granule: region.backing.granule(), reading, region, registered: AtomicBool::new(false) })
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // Once armed, the threads belong to the frozen memory.
        if self.threads.is_empty() {
            return;
        }
        self.freeze.end(Err(FrozenError::Cancelled));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.freeze.merge_again();
    }
}

impl Freezer {
    /// For memory that is being loaded: see [`Engine::freezer`](crate::Engine::freezer).
    pub(crate) fn of_loading(
        memory: &Arc<Memory>,
        fetch: Arc<dyn Fetch>,
        mut regions: Vec<Region>,
        layout: Layout,
        options: &FreezeOptions,
    ) -> Result<Freezer, FreezeError> {
        let view = &memory.view;
        if view.descriptor.foreign() {
            return Err(FreezeError::Foreign);
        }
        region::check(&regions, &layout)?;
        if regions.iter().any(|region| region.foreign) {
            return Err(FreezeError::Foreign);
        }
        check_cores(options.handlers.cores.iter().flatten())?;
        let number = |region: &Region| view.areas.iter().position(|area| area.region.start == region.start);
        regions.sort_by_key(number);
        let mut pairs = regions.iter().zip(&view.areas);
        let other = pairs.find(|(region, area)| region.start != area.region.start || region.len() != area.region.len());
        let longer = regions.get(view.areas.len()).or(view.areas.get(regions.len()).map(|area| &area.region));
        if let Some(region) = other.map(|(region, _)| region).or(longer) {
            return Err(FreezeError::OtherRegions { start: region.start });
        }
        let own = Own::new(features(&regions), options.handlers.cores.len());
        if !fetch.running() {
            arm::complete(&*fetch)?;
            return Freezer::new(Owner::Freeze(own?), regions, layout, options);
        }
        let needed = regions.iter().map(needs).fold(Features::empty(), Features::union);
        let loading = regions.iter().map(needs_loading).fold(Features::empty(), Features::union);
        let available = view.descriptor.features() | (view.descriptor.kernel() & loading);
        let needed = needed | loading;
        if !available.contains(needed) {
            return Err(OpenError::Unsupported { missing: needed - available, available }.into());
        }
        let handed_over = AtomicBool::new(false);
        let owner = Owner::Engine { memory: Arc::clone(memory), fetch, heir: own, handed_over };
        Freezer::new(owner, regions, layout, options)
    }
}
