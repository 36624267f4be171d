//! The thread that decides how an engine ends, and that tells its observer.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use page_source::SourceError;

use crate::load::background::Plan;
use crate::load::fault::Origin;
use crate::load::status::{Outcome, Task};
use crate::memory::Memory;
use crate::memory::poison::stay_open;
use crate::memory::states::State;
use crate::options::Event;
use crate::pause::PausePoint;
use crate::{EngineError, FrozenError};

/// Whom the engine tells.
pub(crate) struct Observer(pub(crate) Box<dyn Fn(&Event) + Send>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) core: Arc<Memory>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) origin: Arc<Origin>,
    pub(crate) observer: Option<Observer>,
    /// The areas that have been reported complete.
    pub(crate) reported: Vec<bool>,
}

impl Supervisor {
    /// Runs until the engine has ended.
    pub(crate) fn run(mut self) {
        self.core.status.supervised_here();
        loop {
            let task = self.core.status.next_task();
            let last = matches!(task, Task::Fail(_));
            match catch_unwind(AssertUnwindSafe(|| self.act(task))) {
                Ok(true) => return,
                Ok(false) => {}
                // Most likely the source has panicked, which is asked here. Nobody else could end the engine.
                Err(_) => {
                    let error = EngineError::ThreadDied("the supervisor panicked");
                    self.core.status.fail(error.clone());
                    if last || !self.core.status.failing() {
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
                let after = self.core.counters.time_to_first_fault().unwrap_or_default();
                self.tell(&Event::FirstFault { after });
            }
            Task::PagesFailed(error) => self.tell(&Event::PagesFailed(error)),
            Task::Check => return self.check(),
            Task::Thaw => self.thaw(),
            Task::Fail(error) => {
                self.fail(error);
                return true;
            }
        }
        false
    }

    /// A freeze has ended on a thread that reads faults.
    fn thaw(&self) {
        let ended = self.core.installing().clone();
        if let Some(shared) = ended.filter(|shared| shared.has_ended()) {
            self.core.thaw(&shared);
        }
        self.core.status.tell(Task::Check);
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
        let (mut missing, mut under_way) = (false, false);
        for number in 0..self.core.areas.len() {
            if self.reported[number] {
                continue;
            }
            match self.lack(number) {
                Lack::Content => missing = true,
                Lack::Install => under_way = true,
                Lack::Nothing => {
                    self.reported[number] = true;
                    self.tell(&Event::RegionComplete { run: self.core.areas[number].region.run });
                }
            }
        }
        if missing {
            // What was requested has been answered, and yet something is missing: an install was undone. Once more.
            self.core.window.set_all_requested(false);
            self.plan.rewind();
            self.core.window.wake();
            return false;
        }
        if under_way {
            // Whoever is at it tells.
            return false;
        }
        match self.origin.finish(&self.core.status) {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                self.core.status.fail(EngineError::Broken(error));
                return false;
            }
            // A thread is asking for something just now, and tells when it has.
            None => return false,
        }
        if self.core.staging.cannot_poison.load(Ordering::Acquire) {
            let reason = "this kernel can't poison the pages that could not be loaded";
            self.core.status.fail(EngineError::Broken(SourceError::stopped(reason)));
            return false;
        }
        if !self.begin_completion() {
            return false;
        }
        self.core.pauses.at(PausePoint::Completing);
        let after = self.core.counters.complete();
        self.core.unregister();
        self.core.status.end(Outcome::Complete(after));
        self.core.window.wake();
        self.tell(&Event::Complete { after });
        true
    }

    /// Not while memory is frozen: unregistering would take the protection off. The end of the freeze has it checked
    /// again.
    fn begin_completion(&self) -> bool {
        let gate = self.core.installing();
        let frozen = gate.as_ref().is_some_and(|shared| !shared.has_ended());
        !frozen && self.core.status.begin_completion()
    }

    /// What of an area's content is still missing, by its page states. Where that is an install, whoever is at it has the
    /// engine checked again.
    fn lack(&self, number: usize) -> Lack {
        let area = &self.core.areas[number];
        let mut lack = Lack::Nothing;
        for granule in area.stored(&*self.origin.pages).flat_map(|(first, granules)| first..first + granules) {
            loop {
                match area.states.get(granule).state {
                    State::Missing => return Lack::Content,
                    State::InFlight => {
                        self.core.status.be_interested();
                        if !area.states.meet(granule) {
                            continue;
                        }
                        lack = Lack::Install;
                    }
                    State::Present | State::Zero | State::Removed | State::Poisoned => {}
                }
                break;
            }
        }
        lack
    }

    /// Poisons what is missing, tells the VMM, and lets the memory go: what is zero then reads as zero.
    fn fail(&mut self, error: EngineError) {
        log::error!("{error}");
        self.core.window.wake();
        if let Some(frozen) = self.core.frozen() {
            frozen.end(Err(FrozenError::Engine(Box::new(error.clone()))));
        }
        self.core.fail_closed(&*self.origin.pages);
        stay_open(&self.core);
        self.core.status.end(Outcome::Failed(error.clone()));
        self.tell(&Event::Failed(error));
    }
}

/// What an area lacks.
enum Lack {
    Nothing,
    /// An install is under way.
    Install,
    /// Something is Missing.
    Content,
}
