//! Whether everything is there, and what happens when it is, or can't be.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use page_source::{Pages, SourceError};
use page_units::{PageCount, PageRun};

use super::intake::Intake;
use super::load::Load;
use super::spans::stored;
use super::status::Outcome;
use crate::EngineError;
use crate::memory::Area;
use crate::memory::gate::holder;
use crate::memory::states::State;
use crate::options::WhenComplete;
use crate::pause::PausePoint;

/// What an area lacks.
enum Lack {
    Nothing,
    /// An install is under way.
    Install,
    /// Something is Missing.
    Content,
}

impl Load {
    /// Whether nothing is missing any more: `None` otherwise, and then the load goes on. Calls `complete` with each area
    /// that has become complete, which is noted in `reported`.
    pub(super) fn check(&self, reported: &mut [bool], mut complete: impl FnMut(PageRun)) -> Option<()> {
        let Intake { memory, window, .. } = &*self.intake;
        let (mut missing, mut under_way) = (false, false);
        for (number, reported) in reported.iter_mut().enumerate().filter(|(_, reported)| !**reported) {
            match self.lack(number) {
                Lack::Content => missing = true,
                Lack::Install => under_way = true,
                Lack::Nothing => {
                    *reported = true;
                    complete(memory.area(number).region.run);
                }
            }
        }
        if missing {
            // What was requested has been answered, and yet something is missing: an install was undone. Once more.
            window.set_all_requested(false);
            self.plan.rewind();
            window.wake();
            return None;
        }
        // The installer tells.
        (!under_way).then_some(())
    }

    /// Lets the memory go: everything is there. `None` if that is not to be believed, or not now.
    pub(super) fn complete(&self) -> Option<Duration> {
        let Intake { memory, status, window, .. } = &*self.intake;
        if status.outcome().is_some() {
            // It is complete, and stays armed.
            return None;
        }
        if self.when_complete == WhenComplete::StayArmed {
            let after = memory.counters.complete();
            return status.complete_armed(after).then_some(after);
        }
        if let Err(error) = self.finish()? {
            status.fail(EngineError::Broken(error));
            return None;
        }
        if memory.cannot_poison() {
            let reason = "this kernel can't poison the pages that could not be loaded";
            status.fail(EngineError::Broken(SourceError::stopped(reason)));
            return None;
        }
        if !self.begin_completion() {
            return None;
        }
        memory.pauses.at(PausePoint::Completing);
        let after = memory.counters.complete();
        memory.view.unregister();
        status.end(Outcome::Complete(after));
        window.wake();
        Some(after)
    }

    /// Not while memory is frozen: unregistering would take the protection off. The end of the freeze has it checked
    /// again.
    fn begin_completion(&self) -> bool {
        let gate = self.intake.memory.view.installing();
        holder(&gate).is_none() && self.intake.status.begin_completion()
    }

    /// How many pages are not in memory yet and may have content.
    pub(crate) fn missing(&self) -> PageCount {
        let memory = &self.intake.memory;
        let granules = |(number, area): (usize, &Area)| {
            let states = memory.states(number);
            let missing = |granule: &usize| matches!(states.get(*granule).state, State::Missing | State::InFlight);
            let spans = stored(area, &*self.pages);
            let count: usize = spans.map(|(first, granules)| (first..first + granules).filter(missing).count()).sum();
            count as u64 * area.granule.0
        };
        PageCount(memory.view.areas.iter().enumerate().map(granules).sum())
    }

    /// The part of an area's content that is still missing, by its page states. Where that is an install, the installer has the
    /// engine checked again.
    fn lack(&self, number: usize) -> Lack {
        let (area, states) = (self.intake.memory.area(number), self.intake.memory.states(number));
        let mut lack = Lack::Nothing;
        for granule in stored(area, &*self.pages).flat_map(|(first, granules)| first..first + granules) {
            loop {
                match states.get(granule).state {
                    State::Missing => return Lack::Content,
                    State::InFlight => {
                        self.intake.status.be_interested();
                        if !states.meet(granule) {
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
}

/// Ends what could not start whole, and has no supervisor. Memory of this process is let go as it is, since its owner is
/// told at once; for that of another process, which would go on with zeros, what is missing is poisoned.
pub(crate) fn give_up(intake: &Intake, source: &dyn Pages) {
    // Nothing is installed from here on. If it has failed before, that is so already.
    intake.status.begin_completion();
    if intake.memory.view.descriptor.foreign() {
        fail_closed(intake, source);
    } else {
        intake.memory.view.unregister();
    }
    intake.status.end(Outcome::Failed(EngineError::Cancelled));
}

/// Poisons what is missing of the source's content, and then lets the memory go.
pub(crate) fn fail_closed(intake: &Intake, source: &dyn Pages) {
    let memory = &intake.memory;
    let blocked = || intake.blocked();
    for (number, area) in memory.view.areas.iter().enumerate() {
        let poison = || memory.poison_missing(number, stored(area, source), blocked);
        if catch_unwind(AssertUnwindSafe(poison)).is_err() {
            // The source has panicked: nobody knows any more what is zero.
            memory.poison_missing(number, std::iter::once((0, area.granules)), blocked);
        }
    }
    if !memory.cannot_poison() {
        memory.view.unregister();
    }
    // A discarding thread waits for its event to be read.
    crate::serve::events::read_without_handlers(memory, intake);
}
