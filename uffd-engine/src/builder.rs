//! From options to a running engine.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{Builder as Thread, JoinHandle};
use std::time::Duration;

use page_source::{PageSink, Source};
use page_units::{PageCount, PageRun};

use crate::load::background;
use crate::load::completion::give_up;
use crate::load::huge::Staging;
use crate::load::intake::Intake;
use crate::load::load::Load;
use crate::load::plan::Plan;
use crate::load::supervisor::{Observer, Supervisor};
use crate::memory::Memory;
use crate::memory::descriptor::Descriptor;
use crate::memory::poison::PoisonOnAbort;
use crate::memory::region::{self, Region};
use crate::options::{Background, Discards, Event, FailurePolicy, Handlers, Wait, WhenComplete};
use crate::pause::Pauses;
use crate::serve::stop::StopPages;
use crate::serve::wait::Waiter;
use crate::serve::{handler, placement};
use crate::sys::abi::Features;
use crate::{Engine, StartError};

/// The options of an engine. See [`Engine::builder`].
#[derive(Debug)]
pub struct Builder {
    regions: Vec<Region>,
    source: Option<Source>,
    descriptor: Option<Descriptor>,
    handlers: Handlers,
    background: Background,
    discards: Discards,
    policy: FailurePolicy,
    around: PageCount,
    staging: usize,
    prefilled: bool,
    observer: Option<Observer>,
    serving: Option<Serving>,
    present: Vec<PageRun>,
    when_complete: WhenComplete,
    wait_limit: Option<Duration>,
    pauses: Pauses,
}

/// What is called when faults are served.
struct Serving(Box<dyn FnOnce() + Send>);

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Serving")
    }
}

impl Default for Builder {
    fn default() -> Builder {
        Builder {
            regions: Vec::new(),
            source: None,
            descriptor: None,
            handlers: Handlers::default(),
            background: Background::default(),
            discards: Discards::Events,
            policy: FailurePolicy::default(),
            around: PageCount(1),
            staging: 16,
            prefilled: false,
            observer: None,
            serving: None,
            present: Vec::new(),
            when_complete: WhenComplete::default(),
            wait_limit: None,
            pauses: Pauses::default(),
        }
    }
}

impl Builder {
    /// A region to serve. May be called several times.
    #[must_use]
    pub fn region(mut self, region: Region) -> Builder {
        self.regions.push(region);
        self
    }

    /// Regions to serve.
    #[must_use]
    pub fn regions(mut self, regions: impl IntoIterator<Item = Region>) -> Builder {
        self.regions.extend(regions);
        self
    }

    /// Where the pages come from.
    #[must_use]
    pub fn source(mut self, source: impl Into<Source>) -> Builder {
        self.source = Some(source.into());
        self
    }

    /// A descriptor that came from elsewhere, on which the regions are registered already. Without one the engine
    /// makes its own.
    #[must_use]
    pub fn descriptor(mut self, descriptor: Descriptor) -> Builder {
        self.descriptor = Some(descriptor);
        self
    }

    /// The threads that serve faults. Default: one, that blocks, unbound.
    #[must_use]
    pub fn handlers(mut self, handlers: Handlers) -> Builder {
        self.handlers = handlers;
        self
    }

    /// The threads that load in the background. Default: one.
    #[must_use]
    pub fn background(mut self, background: Background) -> Builder {
        self.background = background;
        self
    }

    /// How the engine learns of discards. Default: [`Discards::Events`]. With a descriptor from elsewhere its features
    /// decide.
    #[must_use]
    pub fn discards(mut self, discards: Discards) -> Builder {
        self.discards = discards;
        self
    }

    /// What happens when content is unavailable. Default: everything missing is poisoned.
    #[must_use]
    pub fn on_failure(mut self, policy: FailurePolicy) -> Builder {
        self.policy = policy;
        self
    }

    /// How many pages a fault brings: those of its aligned window that are missing right around it. Default:
    /// 1. More costs more for each fault, and saves faults where the guest goes through its memory in order.
    #[must_use]
    pub fn pages_per_fault(mut self, pages: PageCount) -> Builder {
        self.around = pages.clamp(PageCount(1), PageCount(512));
        self
    }

    /// Called on the engine's supervising thread with each [`Event`]. It can't wait for the engine there; see
    /// [`Engine::wait`] and [`Engine::cancel`]. Until it returns the engine does not end, and neither does its drop: it must
    /// not wait for a thread that may drop the engine (a channel that is full, a lock held there).
    #[must_use]
    pub fn observer(mut self, observer: impl Fn(&Event) + Send + 'static) -> Builder {
        self.observer = Some(Observer(Box::new(observer)));
        self
    }

    /// Called once, on the thread that starts the engine, as soon as faults are served: before the background begins, whose
    /// threads may well take the core of that thread for a while.
    ///
    /// What touches the memory may begin, so loading a vCPU's state. It must not be relied upon: if
    /// [`start`](Builder::start) fails after all, what is missing reads as zero. So no guest may run before that has
    /// returned.
    #[must_use]
    pub fn serving(mut self, tell: impl FnOnce() + Send + 'static) -> Builder {
        self.serving = Some(Serving(Box::new(tell)));
        self
    }

    /// Pages that are in the memory already: a receiver has brought them before, or they were populated on purpose. They
    /// stay as they are, and the source is not asked for them. They are whole granules. May be called several times.
    ///
    /// A page that is named here and is not there reads as zero.
    #[must_use]
    pub fn present(mut self, runs: impl IntoIterator<Item = PageRun>) -> Builder {
        self.present.extend(runs);
        self
    }

    /// What happens when every page is in. Default: the memory is let go.
    #[must_use]
    pub fn when_complete(mut self, then: WhenComplete) -> Builder {
        self.when_complete = then;
        self
    }

    /// Tells the observer ([`Event::Waiting`]) of each page that a late source lets a guest wait for longer than this.
    /// Default: never; [`Engine::waiting`] tells at any time.
    #[must_use]
    pub fn report_waits_after(mut self, limit: Duration) -> Builder {
        self.wait_limit = Some(limit);
        self
    }

    /// How many huge pages of private memory may be incomplete at a time (their content came in part). Default: 16, but
    /// never less than what the background asks for at a time (its window) and 16 for faults. A source that scatters the
    /// pages of more huge pages than that fails the engine.
    #[must_use]
    pub fn incomplete_huge_pages(mut self, count: usize) -> Builder {
        self.staging = count.max(1);
        self
    }

    /// The files behind shared memory are filled past the engine on purpose, before it is started or while it runs: a page
    /// that a file holds is content, and is mapped instead of fetched.
    ///
    /// Without it such a page fails the engine ([`EngineError::FilledElsewhere`](crate::EngineError::FilledElsewhere)): most
    /// likely another mapping of the file (of a device process, say) has touched a page that was still missing, which made
    /// it a page of zeros.
    #[must_use]
    pub fn prefilled(mut self) -> Builder {
        self.prefilled = true;
        self
    }

    /// Calls `at` at each [`PausePoint`](crate::pause::PausePoint), on the thread that reaches it. For tests.
    #[cfg(feature = "pause-points")]
    #[must_use]
    pub fn pauses(mut self, at: impl Fn(crate::pause::PausePoint) + Send + Sync + 'static) -> Builder {
        self.pauses = Pauses(Arc::new(at));
        self
    }

    /// Registers the regions and begins to serve them. When it returns, faults are being served: the device state may
    /// be loaded, and the vCPUs started.
    ///
    /// # Errors
    /// If it can't: nothing is registered then, and the memory is as it was. With a descriptor from elsewhere, which is
    /// closed then, what is missing of the regions is poisoned before.
    pub fn start(self) -> Result<Engine, StartError> {
        let hold = PoisonOnAbort::on(self.descriptor.as_ref(), &self.regions);
        let started = self.start_now();
        if let (Ok(_), Some(hold)) = (&started, hold) {
            hold.let_go();
        }
        started
    }

    fn start_now(self) -> Result<Engine, StartError> {
        let source = self.source.ok_or(StartError::Incomplete("an engine needs a source of pages"))?;
        if self.regions.is_empty() {
            return Err(StartError::Incomplete("an engine needs a region to serve"));
        }
        let (pages, again) = (source.pages(), source.repeatable().cloned());
        region::check(&self.regions, pages.layout())?;
        if self.descriptor.is_none() {
            region::check_local(&self.regions)?;
            if self.present.is_empty() {
                region::check_unseen(&self.regions)?;
            }
        }
        placement::check_cores(self.handlers.cores.iter().flatten().chain(&self.background.cores))?;
        let (descriptor, made_here) = match self.descriptor {
            Some(descriptor) => (descriptor, false),
            None => (open(&self.regions, self.discards, self.handlers.wait)?, true),
        };
        let staging = Staging::new(self.staging.max(asked_for(&self.background)));
        let staging = staging.map_err(system("memory for huge pages"))?;
        let (layout, window) = (pages.layout(), self.background.window);
        let memory = Memory::missing(descriptor, self.regions, layout, self.pauses);
        let memory = Arc::new(memory.map_err(system("memory for the page states"))?);
        self.present.iter().try_for_each(|&run| memory.is_present(run))?;
        let waiter = waiter(&memory, &self.handlers)?;
        let policy = (self.policy, self.prefilled);
        let intake = Arc::new(Intake::new(memory, staging, policy, window, self.wait_limit));
        // First of all: a source may begin to push at once.
        if made_here {
            register(&intake.memory)?;
        }
        let sink: Arc<dyn PageSink> = Arc::<Intake>::clone(&intake);
        let feed = match source.start(sink) {
            Ok(feed) => feed,
            Err(error) => {
                give_up(&intake, &*pages);
                intake.memory.stay_open();
                return Err(error.into());
            }
        };
        // From here on an engine exists, and its drop does what is right.
        let plan = Plan::new(&self.background);
        let load =
            Arc::new(Load::new(Arc::clone(&intake), (pages, again), feed, self.around, plan, self.when_complete));
        let mut engine = Engine {
            intake,
            load: Some(Arc::clone(&load)),
            waiter: Arc::new(waiter),
            threads: Vec::new(),
            supervisor: None,
        };
        match engine.spawn(&load, &self.handlers, &self.background, (self.serving, self.observer)) {
            Ok(()) => Ok(engine),
            Err(error) => {
                give_up(&engine.intake, &*load.pages);
                Err(error)
            }
        }
    }
}

/// How many huge pages may be asked for at a time, and have come in part: in the window of the background, of which every
/// loader may overdraw one piece, and for faults.
fn asked_for(background: &Background) -> usize {
    const FAULTS: usize = 16;
    let huge = page_units::PageSize::HUGE.pages().0;
    page_units::ByteLen(background.window.0.div_ceil(huge)).get() + background.threads + FAULTS
}

fn system(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |error| StartError::System { what, error }
}

/// A descriptor for these regions, with what the engine needs and no more.
fn open(regions: &[Region], discards: Discards, wait: Wait) -> Result<Descriptor, StartError> {
    let mut features = Features::empty();
    for region in regions {
        features |= region.backing.features();
    }
    if discards == Discards::Events {
        features |= Features::EVENT_REMOVE;
    }
    let nonblocking = discards == Discards::Events || wait == Wait::Spin;
    // Write protection, should the memory be frozen while it is being loaded: it costs nothing until then.
    let welcome = Features::POISON | Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM;
    Ok(Descriptor::create(features, welcome, nonblocking)?)
}

fn waiter(memory: &Memory, handlers: &Handlers) -> Result<Waiter, StartError> {
    match handlers.wait {
        Wait::Spin => Ok(Waiter::Spin(AtomicBool::new(false))),
        Wait::Block if memory.view.descriptor.foreign() => {
            Waiter::event().map_err(|errno| system("an event descriptor")(errno.into()))
        }
        Wait::Block => {
            let pages = StopPages::new(&memory.view.descriptor, handlers.cores.len());
            Ok(Waiter::Read(pages.map_err(system("the pages that stop fault handlers"))?))
        }
    }
}

/// Registers every region, or none.
fn register(memory: &Memory) -> Result<(), StartError> {
    for (done, area) in memory.view.areas.iter().enumerate() {
        let (start, length) = (area.region.start, area.region.len());
        if let Err(error) = memory.view.descriptor.register(start, length, area.region.mode()) {
            for earlier in &memory.view.areas[..done] {
                let _ = memory.view.descriptor.unregister(earlier.region.start, earlier.region.len());
            }
            return Err(StartError::Register { start, length, error });
        }
    }
    Ok(())
}

impl Engine {
    /// An engine to be configured.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The supervisor last: what it is told before waits for it, and each thread takes its time to begin. A guest that is
    /// resumed gets on sooner when the loaders have brought what it touches first.
    fn spawn(
        &mut self,
        load: &Arc<Load>,
        handlers: &Handlers,
        background: &Background,
        (serving, observer): (Option<Serving>, Option<Observer>),
    ) -> Result<(), StartError> {
        let alone = handlers.cores.len() == 1;
        for (number, &cpu) in handlers.cores.iter().enumerate() {
            let (load, waiter) = (Arc::clone(load), Arc::clone(&self.waiter));
            self.waiter.joining(&self.intake.memory);
            let thread = spawn(format!("uffd-fault-{number}"), move || handler::run(&*load, &waiter, cpu, alone));
            match thread {
                Ok(thread) => self.threads.push(thread),
                Err(error) => {
                    self.waiter.left(&self.intake.memory);
                    return Err(error);
                }
            }
        }
        if let Some(Serving(tell)) = serving {
            tell();
        }
        for number in 0..background.threads {
            let cpu = background.cores.get(number % background.cores.len().max(1)).copied();
            let load = Arc::clone(load);
            let thread = spawn(format!("uffd-load-{number}"), move || background::run(&load, cpu))?;
            self.threads.push(thread);
        }
        let supervisor =
            Supervisor { load: Arc::clone(load), observer, reported: vec![false; self.intake.memory.view.areas.len()] };
        self.supervisor = Some(spawn("uffd-supervisor".into(), move || supervisor.run())?);
        Ok(())
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StartError> {
    Thread::new().name(name).spawn(body).map_err(system("a thread of the engine"))
}
