//! Frozen memory, as a source that pushes each page once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder as Thread, JoinHandle};

use nix::errno::Errno;
use page_source::{
    Answer, Content, End, EndGuard, Feed, OneShot, PageSink, Pages, SinkError, SourceError, Span, Urgency,
};
use page_units::{HostAddr, Layout, PageRun};

use super::freeze::Shared;
use super::saver;
use crate::EngineError;

/// What was done while memory was frozen.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct FreezeStats {
    /// Write faults served: pages whose content was copied away for a writer.
    pub write_faults: u64,
    /// Faults on pages that did not exist yet, which are zero in the snapshot.
    pub hole_faults: u64,
    /// Writers that waited because the pool was full.
    pub waits_for_pool: u64,
    /// 4 KiB pages of content delivered.
    pub pages: u64,
    /// 4 KiB pages of zeros.
    pub zero_pages: u64,
    /// Of all these pages, those that were still missing in memory and were taken from the source that it is loaded from.
    pub pages_from_source: u64,
}

/// Why frozen memory could not be delivered whole. The guest goes on, and its memory is as it should be.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FrozenError {
    /// The sink takes no more.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The guest gave back memory that was not saved yet.
    #[error(
        "pages at {start}..{end} were given back (a balloon?) before they were saved: hold discards off while a snapshot is taken"
    )]
    Discarded {
        /// First byte.
        start: HostAddr,
        /// The byte after the last.
        end: HostAddr,
    },
    /// The kernel refused something.
    #[error("{what} at {at} failed: {errno}")]
    Kernel {
        /// What was tried.
        what: &'static str,
        /// Where.
        at: HostAddr,
        /// What the kernel said.
        errno: Errno,
    },
    /// The memory is still being loaded, and its source has no content for pages that are missing.
    #[error("{run}, still missing in memory: {error}")]
    Source {
        /// The pages, as the source counts them.
        run: PageRun,
        /// What the source says.
        #[source]
        error: SourceError,
    },
    /// The source that the memory is being loaded from is not what it was: nothing that came from it can be trusted.
    #[error("the source that the memory is loaded from has changed: {0}")]
    Changed(#[source] SourceError),
    /// The memory is still being loaded, and that has failed or was given up.
    #[error("the engine that loads the memory has ended: {0}")]
    Engine(#[source] Box<EngineError>),
    /// The content of pages could not be loaded: they are poisoned.
    #[error("{0} could not be loaded, and has no content")]
    Poisoned(PageRun),
    /// The thread that saves has died. This is a defect.
    #[error("the thread that saves frozen memory has died")]
    Died,
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
}

/// Memory as it was at the freeze point: a source that is started once and delivers each page once.
///
/// # Dropping
/// Dropping it, or the feed of what was started, takes the protection off; the guest goes on. What was not delivered by
/// then never will be.
#[derive(Debug)]
pub struct Frozen {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

/// Looks after frozen memory, also after it was started.
#[derive(Clone, Debug)]
pub struct FreezeHandle(Arc<Shared>);

impl FreezeHandle {
    /// Waits until everything is delivered, or can't be.
    ///
    /// # Errors
    /// If something went wrong; the guest goes on all the same.
    pub fn wait(&self) -> Result<FreezeStats, FrozenError> {
        self.0.wait().map(|()| self.stats())
    }

    /// Takes the protection off and ends the delivery.
    pub fn cancel(&self) {
        self.0.end(Err(FrozenError::Cancelled));
        // Somebody else may be at it.
        let _ = self.0.wait();
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> FreezeStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FreezeStats {
            write_faults: of(&self.0.write_faults),
            hole_faults: of(&self.0.hole_faults),
            waits_for_pool: of(&self.0.waits),
            pages: of(&self.0.pages),
            zero_pages: of(&self.0.zero_pages),
            pages_from_source: of(&self.0.from_source),
        }
    }
}

impl Frozen {
    /// A handle that looks after it, also after it was started.
    #[must_use]
    pub fn handle(&self) -> FreezeHandle {
        FreezeHandle(Arc::clone(&self.shared))
    }

    /// Names the pages of shared memory that its file holds, where [`Freezer::arm`](crate::Freezer::arm) was given more
    /// than those: to be called before it is started, for what is not there would be made in order to be read. It may be
    /// looked up while the guest runs: what has come since the freeze point is a hole in the snapshot all the same.
    pub fn set_populated(&self, populated: &[PageRun]) {
        self.shared.replace_populated(populated);
    }

    /// Whether the memory is still being loaded, by the [engine](crate::Engine::freezer) that it was frozen with.
    #[must_use]
    pub fn is_loading(&self) -> bool {
        self.shared.is_loading()
    }

    pub(crate) fn release(&mut self) {
        self.handle().cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a write-fault handler had panicked");
            }
        }
        self.shared.owner.forget(&self.shared);
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.release();
    }
}

/// The layout of frozen memory, of whose pages nothing is known before they come.
#[derive(Debug)]
struct FrozenPages(Layout);

impl Pages for FrozenPages {
    fn layout(&self) -> &Layout {
        &self.0
    }

    fn content(&self, run: PageRun) -> Span {
        Span::new(Content::Unknown, self.0.clip(run).pages)
    }
}

impl OneShot for Frozen {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::new(FrozenPages(self.shared.layout.clone()))
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let shared = Arc::clone(&self.shared);
        let thread = Thread::new().name("uffd-save".into()).spawn(move || {
            let guard = EndGuard::new(sink);
            let _dying = Dying(&shared);
            shared.end(saver::run(&shared, guard.sink()));
            // The end that counts, which need not be that one: nothing is published that was cancelled.
            guard.end(match shared.wait() {
                Ok(()) => End::Complete,
                Err(FrozenError::Cancelled) => End::Stopped,
                Err(error) => End::Broken(SourceError::stopped(error)),
            });
        });
        let thread = thread.map_err(|error| SourceError::stopped("no thread can be started").with_cause(error))?;
        Ok(Box::new(FrozenFeed { frozen: *self, thread: Some(thread) }))
    }
}

/// Ends the freeze if the thread dies that saves: writers wait for it.
struct Dying<'a>(&'a Shared);

impl Drop for Dying<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(FrozenError::Died));
        }
    }
}

/// The flow of frozen pages.
#[derive(Debug)]
struct FrozenFeed {
    frozen: Frozen,
    thread: Option<JoinHandle<()>>,
}

impl FrozenFeed {
    fn stop(&mut self) {
        self.frozen.shared.end(Err(FrozenError::Cancelled));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that saves frozen memory had panicked");
        }
    }
}

impl Feed for FrozenFeed {
    /// Every page comes without being asked for, those that are written first.
    fn request(&self, _: PageRun, _: Urgency) -> Answer {
        Answer::Later
    }

    /// What was delivered is what memory was at the freeze point; what it was loaded from was asked before the end.
    fn finish(mut self: Box<Self>) -> Result<(), SourceError> {
        self.stop();
        Ok(())
    }
}

impl Drop for FrozenFeed {
    fn drop(&mut self) {
        self.stop();
    }
}
