//! Frozen memory, as a source that pushes each page once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder as Thread, JoinHandle};

use nix::errno::Errno;
use page_source::{Content, End, Feed, PageSink, PageSource, SinkError, SourceError, Span, Urgency};
use page_units::{BlockId, HostAddr, Layout, PageCount, PageIndex, PageRun};

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
    /// It was cancelled.
    #[error("the snapshot was cancelled")]
    Cancelled,
}

/// Memory as it was at the freeze point. Delivers each page once: start it once.
///
/// # Dropping
/// Dropping it takes the protection off; the guest goes on. What was not delivered by then never will be.
#[derive(Debug)]
pub struct Frozen {
    pub(crate) shared: Arc<Shared>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

impl Frozen {
    /// Waits until everything is delivered, or can't be.
    ///
    /// # Errors
    /// If something went wrong; the guest goes on all the same.
    pub fn wait(&self) -> Result<FreezeStats, FrozenError> {
        self.shared.wait().map(|()| self.stats())
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

    /// Takes the protection off and ends the delivery.
    pub fn cancel(&self) {
        self.shared.end(Err(FrozenError::Cancelled));
        // Somebody else may be at it.
        let _ = self.shared.wait();
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> FreezeStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FreezeStats {
            write_faults: of(&self.shared.write_faults),
            hole_faults: of(&self.shared.hole_faults),
            waits_for_pool: of(&self.shared.waits),
            pages: of(&self.shared.pages),
            zero_pages: of(&self.shared.zero_pages),
            pages_from_source: of(&self.shared.from_source),
        }
    }

    pub(crate) fn release(&mut self) {
        self.cancel();
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

impl PageSource for Frozen {
    fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        let pages = self.shared.layout.get(block).map_or(0, |block| block.pages().0);
        Span { content: Content::Unknown, pages: PageCount(pages.saturating_sub(first.0)) }
    }

    fn repeatable(&self) -> bool {
        false
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let stopped = |reason: String| SourceError::Stopped { reason };
        if self.shared.started.swap(true, Ordering::AcqRel) {
            return Err(stopped("frozen memory is delivered once".into()));
        }
        let shared = Arc::clone(&self.shared);
        let thread = Thread::new().name("uffd-save".into()).spawn(move || {
            shared.end(saver::run(&shared, &*sink));
            // The end that counts, which need not be that one: nothing is published that was cancelled.
            let reason = match shared.wait() {
                Ok(()) => return sink.end(End::Complete),
                Err(error) => error.to_string(),
            };
            sink.end(End::Broken(SourceError::Stopped { reason }));
        });
        let thread = thread.map_err(|error| stopped(format!("no thread: {error}")))?;
        Ok(Box::new(FrozenFeed { shared: Arc::clone(&self.shared), thread: Some(thread) }))
    }
}

/// The flow of frozen pages.
#[derive(Debug)]
struct FrozenFeed {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Feed for FrozenFeed {
    /// Every page comes without being asked for, those that are written first.
    fn request(&self, _: PageRun, _: Urgency) {}

    fn alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for FrozenFeed {
    fn drop(&mut self) {
        self.shared.end(Err(FrozenError::Cancelled));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that saves frozen memory had panicked");
        }
    }
}
