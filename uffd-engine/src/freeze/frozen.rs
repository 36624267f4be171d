//! Frozen memory, as a source that pushes each page once.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder as Thread, JoinHandle};

use page_source::{Answer, Content, End, EndGuard, Feed, OneShot, PageSink, Pages, SourceError, Span, Urgency};
use page_units::{Layout, PageRun};

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

/// Memory as it was at the freeze point: a source that is started once and delivers each page once.
///
/// It can also do what its [handle](Frozen::handle) can, as long as it is not started.
///
/// # Dropping
/// Dropping it, or the feed of what was started, takes the protection off; the guest goes on. What was not delivered by
/// then never will be.
#[derive(Debug)]
pub struct Frozen {
    pub(crate) handle: FreezeHandle,
    pub(crate) threads: Vec<JoinHandle<()>>,
}

/// Looks after frozen memory, also after it was started.
#[derive(Clone, Debug)]
pub struct FreezeHandle(pub(crate) Arc<Freeze>);

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
        self.handle.clone()
    }

    pub(crate) fn release(&mut self) {
        self.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a write-fault handler had panicked");
            }
        }
        let freeze = &self.handle.0;
        let holder: Arc<dyn crate::memory::holder::Holder> = Arc::<Freeze>::clone(freeze);
        freeze.owner.forget(&holder);
        freeze.merge_again();
    }
}

impl Deref for Frozen {
    type Target = FreezeHandle;

    fn deref(&self) -> &FreezeHandle {
        &self.handle
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
        Arc::new(FrozenPages(self.handle.0.layout.clone()))
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let freeze = Arc::clone(&self.handle.0);
        let thread = Thread::new().name("uffd-save".into()).spawn(move || {
            let guard = EndGuard::new(sink);
            let _on_exit = OnExit(&freeze);
            freeze.end(saver::run(&freeze, guard.sink()));
            // The end that counts, which need not be that one: nothing is published that was cancelled.
            guard.end(match freeze.wait() {
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
struct OnExit<'a>(&'a Freeze);

impl Drop for OnExit<'_> {
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
        self.frozen.handle.0.end(Err(FrozenError::Cancelled));
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
