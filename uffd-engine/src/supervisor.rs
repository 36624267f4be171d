//! The thread that decides how an engine ends, and that tells its observer.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use page_source::{PageSource, SourceError};

use crate::core::Core;
use crate::fault::Origin;
use crate::loader::Plan;
use crate::options::Event;
use crate::pause::PausePoint;
use crate::state::State;
use crate::status::{Outcome, Task};
use crate::sys::ops;
use crate::{EngineError, FrozenError, stats};

/// Whom the engine tells.
pub(crate) struct Observer(pub(crate) Box<dyn Fn(&Event) + Send>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

#[derive(Debug)]
pub(crate) struct Supervisor {
    pub(crate) core: Arc<Core>,
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
            Task::LookUp => self.look_up(),
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

    /// A source that has died without a word would leave its pages outstanding for ever.
    fn look_up(&self) {
        if !self.core.outstanding.none() && !self.origin.feed.alive() {
            let (peer, reason) = ("the source of the pages".into(), "it has stopped answering".into());
            self.core.status.fail(EngineError::Broken(SourceError::Peer { peer, reason }));
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
            self.core.outstanding.set_all_requested(false);
            self.plan.rewind();
            self.core.outstanding.wake();
            return false;
        }
        if under_way {
            // Whoever is at it tells.
            return false;
        }
        if let Err(error) = self.origin.source.verify() {
            self.core.status.fail(EngineError::Broken(error));
            return false;
        }
        if self.core.staging.cannot_poison.load(Ordering::Acquire) {
            let reason = "this kernel can't poison the pages that could not be had".into();
            self.core.status.fail(EngineError::Broken(SourceError::Stopped { reason }));
            return false;
        }
        if !self.begin_completion() {
            return false;
        }
        self.core.pauses.at(PausePoint::Completing);
        let after = self.core.counters.complete();
        self.core.unregister();
        self.core.status.end(Outcome::Complete(after));
        self.core.outstanding.wake();
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
        for granule in area.stored(&*self.origin.source).flat_map(|(first, granules)| first..first + granules) {
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
        self.core.outstanding.wake();
        if let Some(frozen) = self.core.frozen() {
            frozen.end(Err(FrozenError::Engine(Box::new(error.clone()))));
        }
        self.core.fail_closed(&*self.origin.source);
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

/// Where pages can't be poisoned, the descriptor is never closed: what is missing would read as zero then.
pub(crate) fn stay_open(core: &Arc<Core>) {
    if core.staging.cannot_poison.load(Ordering::Acquire) {
        log::error!("this kernel can't poison pages: the descriptor stays open, and what is missing stays blocked");
        std::mem::forget(Arc::clone(core));
    }
}

impl Core {
    /// Ends what could not start whole, and has no supervisor. Memory of this process is let go as it is, since its owner
    /// is told at once; for that of another process, which would go on with zeros, what is missing is poisoned.
    pub(crate) fn give_up(&self, source: &dyn PageSource) {
        // Nothing is installed from here on. If it has failed before, that is so already.
        self.status.begin_completion();
        if self.descriptor.foreign() {
            self.fail_closed(source);
        } else {
            self.unregister();
        }
        self.status.end(Outcome::Failed(EngineError::Cancelled));
    }

    /// Poisons what is missing of the source's content, and then lets the memory go.
    pub(crate) fn fail_closed(&self, source: &dyn PageSource) {
        for number in 0..self.areas.len() {
            let area = &self.areas[number];
            let stored = || self.poison_missing(number, area.stored(source));
            if catch_unwind(AssertUnwindSafe(stored)).is_err() {
                // Nobody knows any more what is zero.
                self.poison_missing(number, std::iter::once((0, area.states.len())));
            }
        }
        if !self.staging.cannot_poison.load(Ordering::Acquire) {
            self.unregister();
        }
        // Whoever gives memory back waits for the event to be read.
        self.read_for_want_of_handlers();
    }

    fn poison_missing(&self, number: usize, spans: impl Iterator<Item = (usize, usize)>) {
        let area = &self.areas[number];
        for (first, granules) in spans {
            let mut at = first;
            while at < first + granules {
                let run = (at..first + granules).take_while(|&granule| area.states.claim_missing(granule)).count();
                if run > 0 {
                    self.poison_range(number, at, run);
                    at += run;
                } else if matches!(area.states.get(at).state, State::InFlight | State::Missing) {
                    // Whoever is at it sees that the engine has failed, and ends soon, one way or the other.
                    std::thread::yield_now();
                } else {
                    at += 1;
                }
            }
        }
    }

    /// In as few calls as the kernel makes of it; page by page where something is in the way.
    fn poison_range(&self, number: usize, first: usize, granules: usize) {
        let area = &self.areas[number];
        let end = first + granules;
        let mut at = first;
        while at < end {
            let (addr, len) = (area.addr(at), area.len_of(end - at));
            let poisoned = match ops::poison(self.descriptor.fd(), addr.0, len.0) {
                ops::Done::All => end - at,
                ops::Done::Part(bytes) => usize::try_from(bytes / area.len_of(1).0).unwrap_or(0),
                ops::Done::Failed(_) => 0,
            };
            stats::bump(&self.counters.poisoned, poisoned as u64 * area.granule.0);
            at += poisoned;
            if poisoned == 0 {
                self.poison_in_kernel(number, at);
                at += 1;
            }
        }
        for granule in first..end {
            area.states.settle(granule, State::Poisoned);
        }
    }
}
