//! Frozen memory, as a source that pushes each page once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder as Thread, JoinHandle};

use page_source::{Content, End, Feed, PageSink, PageSource, SourceError, Span, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun};

use super::error::FrozenError;
use super::freeze::Freeze;
use super::saver;

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

/// Memory as it was at the freeze point. Delivers each page once: start it once.
///
/// # Dropping
/// Dropping it takes the protection off; the guest goes on. What was not delivered by then never will be.
#[derive(Debug)]
pub struct Frozen {
    pub(crate) freeze: Arc<Freeze>,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

impl Frozen {
    /// Waits until everything is delivered, or can't be.
    ///
    /// # Errors
    /// If something went wrong; the guest goes on all the same.
    pub fn wait(&self) -> Result<FreezeStats, FrozenError> {
        self.freeze.wait().map(|()| self.stats())
    }

    /// Takes the protection off and ends the delivery.
    pub fn cancel(&self) {
        self.freeze.end(Err(FrozenError::Cancelled));
        // Somebody else may be at it.
        let _ = self.freeze.wait();
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> FreezeStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FreezeStats {
            write_faults: of(&self.freeze.write_faults),
            hole_faults: of(&self.freeze.hole_faults),
            waits_for_pool: of(&self.freeze.waits),
            pages: of(&self.freeze.pages),
            zero_pages: of(&self.freeze.zero_pages),
            pages_from_source: of(&self.freeze.from_source),
        }
    }

    pub(crate) fn release(&mut self) {
        self.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a write-fault handler had panicked");
            }
        }
        self.freeze.owner.forget(&self.freeze);
        self.freeze.merge_again();
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.release();
    }
}

impl PageSource for Frozen {
    fn layout(&self) -> &Layout {
        &self.freeze.layout
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        let pages = self.freeze.layout.get(block).map_or(0, |block| block.pages().0);
        Span { content: Content::Unknown, pages: PageCount(pages.saturating_sub(first.0)) }
    }

    fn repeatable(&self) -> bool {
        false
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let stopped = |reason: String| SourceError::Stopped { reason };
        if self.freeze.started.swap(true, Ordering::AcqRel) {
            return Err(stopped("frozen memory is delivered once".into()));
        }
        let freeze = Arc::clone(&self.freeze);
        let thread = Thread::new().name("uffd-save".into()).spawn(move || {
            freeze.end(saver::run(&freeze, &*sink));
            // The end that counts, which need not be that one: nothing is published that was cancelled.
            let reason = match freeze.wait() {
                Ok(()) => return sink.end(End::Complete),
                Err(error) => error.to_string(),
            };
            sink.end(End::Broken(SourceError::Stopped { reason }));
        });
        let thread = thread.map_err(|error| stopped(format!("no thread: {error}")))?;
        Ok(Box::new(FrozenFeed { freeze: Arc::clone(&self.freeze), thread: Some(thread) }))
    }
}

/// The flow of frozen pages.
#[derive(Debug)]
struct FrozenFeed {
    freeze: Arc<Freeze>,
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
        self.freeze.end(Err(FrozenError::Cancelled));
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread that saves frozen memory had panicked");
        }
    }
}
