//! From regions to frozen memory: everything that can fail first, then the arming.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::Builder as Thread;

use nix::errno::Errno;
use page_units::{ByteLen, HostAddr, Layout, PageRun};

use super::arm::arm_all;
use super::freeze::{Shared, Zone};
use super::frozen::{Frozen, FrozenError};
use super::owner::Owner;
use super::page_table::PageTable;
use super::pool::Pool;
use super::saved::Saved;
use super::writers;
use crate::memory::Memory;
use crate::memory::backing::Backing;
use crate::memory::descriptor::Descriptor;
use crate::memory::holder::Fetch;
use crate::memory::region::{self, Region};
use crate::serve::placement::check_cores;
use crate::sys::abi::Features;
use crate::{Handlers, OpenError, StartError};

/// How memory is frozen.
#[derive(Clone, Debug)]
pub struct FreezeOptions {
    /// Copies of pages whose writers went on, and that are not written out yet, take at most so much memory. When it
    /// is full, writers wait.
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

/// Why memory can't be frozen. The guest's memory is as it was.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FreezeError {
    /// There is no descriptor, or the kernel can't write-protect this memory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The regions can't be, or a thread or memory is missing.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The engine is not loading any more: the memory is complete, and frozen without it, or could not be loaded.
    #[error("the engine that loaded the memory has ended: freeze the memory without it")]
    EngineEnded,
    /// The memory is frozen already.
    #[error("this memory is frozen already")]
    Busy,
    /// The engine serves other regions than those.
    #[error("the engine does not serve exactly these regions: see {start}")]
    OtherRegions {
        /// A region of either that the other lacks.
        start: HostAddr,
    },
    /// The memory belongs to another process.
    #[error("the memory belongs to another process, which alone can read it")]
    Foreign,
    /// The kernel refused to register or to write-protect a range. `EBUSY`: another userfaultfd has it, that of an
    /// engine which is still loading.
    #[error("write-protecting {length} bytes at {start} failed: {errno}")]
    Arm {
        /// Where.
        start: HostAddr,
        /// How much.
        length: ByteLen,
        /// What the kernel said.
        errno: Errno,
    },
}

/// Everything a freeze needs, made before the guest is stopped.
#[derive(Debug)]
pub struct Freezer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Vec<std::thread::JoinHandle<()>>,
}

impl Freezer {
    /// Checks the regions, and makes the descriptor, the pool and the threads. All regions must be of one granule.
    ///
    /// # Errors
    /// If anything is missing. Nothing has happened to the memory then.
    pub fn prepare(regions: Vec<Region>, layout: Layout, options: &FreezeOptions) -> Result<Freezer, FreezeError> {
        region::check(&regions, &layout)?;
        if regions.iter().any(|region| region.foreign) {
            return Err(FreezeError::Foreign);
        }
        check_cores(options.handlers.cores.iter().flatten())?;
        let mut features = Features::EVENT_REMOVE;
        for region in &regions {
            features |= region.backing.features() | needs(region);
        }
        let descriptor = Descriptor::create(features, Features::empty(), true)?;
        let owner = Owner::freeze(descriptor, options.handlers.cores.len());
        let owner = owner.map_err(|errno| system("an event descriptor")(errno.into()))?;
        let shared = shared(owner, regions, layout, options)?;
        let mut freezer = Freezer { shared, threads: Vec::new() };
        for (number, &cpu) in options.handlers.cores.iter().enumerate() {
            let shared = Arc::clone(&freezer.shared);
            let thread =
                Thread::new().name(format!("uffd-write-{number}")).spawn(move || writers::run(&shared, number, cpu));
            freezer.threads.push(thread.map_err(system("a thread"))?);
        }
        Ok(freezer)
    }

    /// Whether the memory is still being loaded, by an [engine](crate::Engine::freezer).
    #[must_use]
    pub fn is_loading(&self) -> bool {
        self.shared.is_loading()
    }

    /// Calls `at` at each [`PausePoint`](crate::PausePoint) of frozen memory, on the thread that reaches it. For tests.
    #[cfg(feature = "pause-points")]
    #[must_use]
    pub fn pauses(self, at: impl Fn(crate::PausePoint) + Send + Sync + 'static) -> Freezer {
        self.shared.pauses.get_or_init(|| crate::pause::Pauses(Arc::new(at)));
        self
    }

    /// Write-protects what is populated. That moment is the freeze point; the caller has stopped everything that writes
    /// to the memory: vCPUs, device models, and I/O in flight that goes around the page tables (direct I/O,
    /// `io_uring`, DMA, other mappings of the same memory), which nothing here could catch.
    ///
    /// `populated` names the pages of shared memory (memfd, hugetlbfs) that its file holds: for private memory the
    /// page table tells, and nothing needs to be given. It costs the time of the write-protection and no more. It may
    /// name more pages than there are, if [`Frozen::set_populated`] tells them exactly afterwards: long runs are protected
    /// faster than many short ones, and holes among them stay holes, which are caught as missing.
    ///
    /// # Errors
    /// If the kernel refuses. The memory is as it was then.
    pub fn arm(mut self, populated: &[PageRun]) -> Result<Frozen, FreezeError> {
        let threads = std::mem::take(&mut self.threads);
        let mut frozen = Frozen { shared: Arc::clone(&self.shared), threads };
        let result = match &self.shared.owner {
            Owner::Freeze { .. } => arm_all(&self.shared, populated),
            Owner::Engine { memory, fetch } => self.arm_with(memory, &**fetch, populated),
        };
        match result {
            Ok(()) => Ok(frozen),
            Err(error) => {
                frozen.release();
                Err(error)
            }
        }
    }

    /// Nothing is being installed at the freeze point, and no discard read: a page is either there, and protected, or
    /// its content is that of the source.
    fn arm_with(&self, memory: &Memory, fetch: &dyn Fetch, populated: &[PageRun]) -> Result<(), FreezeError> {
        let _no_discards = memory.view.discarding.write();
        loop {
            let mut gate = memory.view.gate_alone();
            if !fetch.running() {
                return Err(FreezeError::EngineEnded);
            }
            if gate.as_ref().is_some_and(|other| !other.has_ended()) {
                return Err(FreezeError::Busy);
            }
            match arm_all(&self.shared, populated) {
                Ok(()) => {
                    *gate = Some(Arc::<Shared>::clone(&self.shared));
                    return Ok(());
                }
                // A discard waits for its event to be read, by whoever waits for us.
                Err(FreezeError::Arm { errno: Errno::EAGAIN, .. }) => {}
                Err(error) => return Err(error),
            }
            drop(gate);
            std::thread::yield_now();
        }
    }
}

/// What freezing needs of the kernel besides.
fn needs(region: &Region) -> Features {
    match region.backing {
        Backing::Anonymous => Features::PAGEFAULT_FLAG_WP,
        Backing::Memfd | Backing::Hugetlb => Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM,
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |error| StartError::System { what, error }
}

/// Everything that can be made beforehand.
fn shared(
    owner: Owner,
    regions: Vec<Region>,
    layout: Layout,
    options: &FreezeOptions,
) -> Result<Arc<Shared>, FreezeError> {
    let granule = regions.first().map_or(Backing::Anonymous, |region| region.backing).granule();
    if regions.iter().any(|region| region.backing.granule() != granule) {
        return Err(StartError::Incomplete("regions of different page sizes are not frozen together").into());
    }
    let buffers = ByteLen(options.pool.0 / granule.bytes().0).get();
    let pool = Pool::new(buffers, granule.bytes()).map_err(system("the pool of copied pages"))?;
    let page_table = PageTable::open().map_err(system("/proc/self/pagemap"))?;
    let zones = regions
        .into_iter()
        .map(|region| {
            let saved = Saved::new(region.granules())?;
            let registered = AtomicBool::new(false);
            Ok(Zone { saved, granule: region.backing.granule(), region, registered })
        })
        .collect::<io::Result<Vec<_>>>()
        .map_err(system("memory for the page states"))?;
    let shared = Shared::new(owner, zones, layout, pool, page_table);
    Ok(Arc::new(shared.map_err(|errno| system("a page of zeros")(errno.into()))?))
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // Once armed, the threads belong to the frozen memory.
        if self.threads.is_empty() {
            return;
        }
        self.shared.end(Err(FrozenError::Cancelled));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
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
        if !fetch.running() {
            return Err(FreezeError::EngineEnded);
        }
        region::check(&regions, &layout)?;
        let needed = regions.iter().map(needs).fold(Features::empty(), Features::union);
        let available = view.descriptor.features();
        if !available.contains(needed) {
            return Err(OpenError::Unsupported { missing: needed - available, available }.into());
        }
        let number = |region: &Region| view.areas.iter().position(|area| area.region.start == region.start);
        regions.sort_by_key(number);
        let mut pairs = regions.iter().zip(&view.areas);
        let other = pairs.find(|(region, area)| region.start != area.region.start || region.len() != area.region.len());
        let longer = regions.get(view.areas.len()).or(view.areas.get(regions.len()).map(|area| &area.region));
        if let Some(region) = other.map(|(region, _)| region).or(longer) {
            return Err(FreezeError::OtherRegions { start: region.start });
        }
        let owner = Owner::Engine { memory: Arc::clone(memory), fetch };
        Ok(Freezer { shared: shared(owner, regions, layout, options)?, threads: Vec::new() })
    }
}
