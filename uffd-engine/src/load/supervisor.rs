//! The thread that decides how an engine ends, and that tells its observer.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::completion::fail_closed;
use super::load::Load;
use super::status::{Outcome, Task};
use crate::EngineError;
use crate::options::Event;

/// Whom the engine tells.
pub(crate) struct Observer(pub(crate) Box<dyn Fn(&Event) + Send>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) load: Arc<Load>,
    pub(crate) observer: Option<Observer>,
    /// The areas that have been reported complete.
    pub(crate) reported: Vec<bool>,
}

impl Supervisor {
    /// Runs until the engine has ended.
    pub(crate) fn run(mut self) {
        self.load.intake.status.supervised_here();
        loop {
            let task = self.load.intake.status.next_task(self.load.intake.latencies.deadline());
            let last = matches!(task, Task::Fail(_));
            match catch_unwind(AssertUnwindSafe(|| self.act(task))) {
                Ok(true) => return,
                Ok(false) => {}
                // Most likely the source has panicked, which is asked here. Nobody else could end the engine.
                Err(_) => {
                    let error = EngineError::ThreadDied("the supervisor panicked");
                    self.load.intake.status.fail(error.clone());
                    if last || !self.load.intake.status.failing() {
                        return self.fail(error);
                    }
                }
            }
        }
    }

    /// Does one thing. `true` if that was the last one.
    fn act(&mut self, task: Task) -> bool {
        match task {
            Task::FirstFault => {
                let after = self.load.intake.memory.counters.time_to_first_fault().unwrap_or_default();
                self.tell(&Event::FirstFault { after });
            }
            Task::PagesFailed(error) => self.tell(&Event::PagesFailed(error)),
            Task::Check => return self.check(),
            Task::Thaw => self.thaw(),
            Task::Waits => self.waits(),
            Task::Fail(error) => {
                self.fail(error);
                return true;
            }
        }
        false
    }

    /// A freeze has ended on a thread that reads faults.
    fn thaw(&self) {
        let ended = self.load.intake.memory.view.installing().clone();
        if let Some(holder) = ended.filter(|holder| holder.has_ended()) {
            holder.thaw();
        }
        self.load.intake.status.tell(Task::Check);
    }

    /// Tells of the pages that have been waited for longer than the limit.
    fn waits(&mut self) {
        let intake = Arc::clone(&self.load.intake);
        for (place, time) in intake.latencies.overdue() {
            let run = intake.memory.area(place.area).pages(place.granule, 1);
            self.tell(&Event::Waiting { run, time });
        }
    }

    /// An observer that panics is not told anything any more: what this thread has to do must still be done.
    fn tell(&mut self, event: &Event) {
        log::debug!("{event:?}");
        let Some(observer) = self.observer.take() else { return };
        match catch_unwind(AssertUnwindSafe(|| (observer.0)(event))) {
            Ok(()) => self.observer = Some(observer),
            Err(_) => log::error!("the observer of an engine panicked at {event:?}"),
        }
    }

    /// Ends the engine if nothing is missing any more.
    fn check(&mut self) -> bool {
        let mut complete = Vec::new();
        let found = self.load.check(&mut self.reported, |run| complete.push(run));
        for run in complete {
            self.tell(&Event::RegionComplete { run });
        }
        let Some(after) = found.and_then(|()| self.load.complete()) else { return false };
        self.tell(&Event::Complete { after });
        true
    }

    /// Poisons what is missing, tells the VMM, and lets the memory go: what is zero then reads as zero.
    fn fail(&mut self, error: EngineError) {
        // One that is complete, and stays armed until it is dropped, has not failed.
        let dropped = matches!(error, EngineError::Cancelled) && self.load.intake.status.outcome().is_some();
        if !dropped {
            log::error!("{error}");
        }
        self.load.intake.window.wake();
        let memory = &self.load.intake.memory;
        if let Some(holder) = memory.view.frozen() {
            holder.engine_failed(&error);
        }
        fail_closed(&self.load.intake, &*self.load.pages);
        memory.stay_open();
        self.load.intake.status.end(Outcome::Failed(error.clone()));
        if !dropped {
            self.tell(&Event::Failed(error));
        }
    }
}
