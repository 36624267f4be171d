//! A load: where the pages come from, and what takes them in.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use page_source::{Feed, PageSource, Pages, SharedFeed, SourceError, Urgency};
use page_units::{PageCount, PageRun};

use super::intake::Intake;
use super::plan::Plan;
use super::status::Task;
use crate::EngineError;
use crate::options::WhenComplete;

/// What asks for pages: for a fault, and in the background.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) intake: Arc<Intake>,
    /// What is known of the source's pages.
    pub(crate) pages: Arc<dyn Pages>,
    /// The source, if it may be started again.
    pub(crate) again: Option<Arc<dyn PageSource>>,
    feed: SharedFeed,
    /// The supervisor waits until nobody is asking, in order to finish the flow.
    finish_is_due: AtomicBool,
    /// How many pages are asked for at a time, around a fault.
    pub(crate) around: PageCount,
    pub(crate) plan: Plan,
    pub(super) when_complete: WhenComplete,
}

impl Load {
    /// What takes its pages in through `intake` from a source that was started. `around`: how many pages a fault asks for.
    pub(crate) fn new(
        intake: Arc<Intake>,
        (pages, again): (Arc<dyn Pages>, Option<Arc<dyn PageSource>>),
        feed: Box<dyn Feed>,
        around: PageCount,
        plan: Plan,
        when_complete: WhenComplete,
    ) -> Load {
        let (feed, finish_is_due) = (SharedFeed::new(feed), AtomicBool::new(false));
        Load { intake, pages, again, feed, finish_is_due, around, plan, when_complete }
    }

    /// Asks the source.
    pub(super) fn ask(&self, run: PageRun, urgency: Urgency) {
        let status = &self.intake.status;
        if self.feed.request(run, urgency).is_none() {
            let error = SourceError::stopped(format_args!("{run} is needed, after everything had come"));
            status.fail(EngineError::Broken(error));
        }
        if self.finish_is_due.load(Ordering::SeqCst) {
            status.tell(Task::Check);
        }
    }

    /// Ends the flow: is what was delivered still true? `None` if a thread is asking for pages just now, which has it all
    /// checked again.
    pub(super) fn finish(&self) -> Option<Result<(), SourceError>> {
        self.intake.status.finishing_source();
        self.finish_is_due.store(true, Ordering::SeqCst);
        self.feed.try_finish()
    }
}
