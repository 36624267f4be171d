//! The engine as a sink of pages.

use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError, SourceErrorKind, Subject};
use page_units::{PageCount, PageRun};

use super::intake::{Flow, Intake, stopped};
use super::pieces::count;
use super::status::Task;
use crate::EngineError;
use crate::memory::Place;
use crate::memory::states::State;
use crate::options::FailurePolicy;

impl PageSink for Intake {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.take_data(run, bytes).into()
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take_zero(run).into()
    }

    /// There is nothing below.
    fn absent(&self, run: PageRun) -> Reply {
        let error = SinkError::Absent(run);
        let what = error.to_string();
        let absent = SourceError::new(SourceErrorKind::Corrupt, Subject::none().run(run), what);
        match self.take_failed(run, &absent) {
            Flow::Continue(()) => Reply::Taken,
            Flow::Break(_) => error.into(),
        }
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.take_failed(run, &error).into()
    }

    fn end(&self, end: End) {
        match end {
            End::Complete => self.rest_is_zero(),
            End::Broken(error) => self.status.fail(EngineError::Broken(error)),
            // By us, when all is there.
            End::Stopped if self.status.source_finishes() => {}
            End::Stopped => {
                let subject = Subject::peer("the source of the pages");
                let error = SourceError::new(SourceErrorKind::PeerGone, subject, "it ended before everything had come");
                self.status.fail(EngineError::Broken(error));
            }
        }
    }
}

impl Intake {
    fn take_data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        if bytes.len() != run.len() {
            let reason = format!("{} bytes were delivered for {run}", bytes.len());
            let error = SourceError::new(SourceErrorKind::Protocol, Subject::none().run(run), reason.clone());
            self.status.fail(self.source_error(run, error));
            return Flow::Break(SinkError::Stopped { reason }.into());
        }
        for (number, part) in self.memory.view.parts(run) {
            if !self.status.running() {
                return Flow::Break(stopped());
            }
            let bytes = bytes.slice((part.first - run.first).to_bytes(), part.len());
            let area = self.memory.area(number);
            if area.small() {
                self.install_bytes(number, area.granule_of(part.first), count(part.pages), bytes)?;
            } else {
                self.gather(number, part, Some(bytes))?;
            }
        }
        Flow::Continue(())
    }

    fn take_zero(&self, run: PageRun) -> Flow {
        for (number, part) in self.memory.view.parts(run) {
            if !self.status.running() {
                return Flow::Break(stopped());
            }
            let area = self.memory.area(number);
            if area.small() {
                for page in part.iter() {
                    self.zero_granule(number, area.granule_of(page))?;
                }
            } else {
                self.gather(number, part, None)?;
            }
        }
        Flow::Continue(())
    }

    fn take_failed(&self, run: PageRun, error: &SourceError) -> Flow {
        for (number, part) in self.memory.view.parts(run) {
            if !self.status.running() {
                return Flow::Break(stopped());
            }
            let error = self.source_error(part, error.clone());
            if self.policy == FailurePolicy::PoisonMissing {
                self.status.fail(error);
                return Flow::Break(stopped());
            }
            self.status.pages_fail(&error);
            let area = self.memory.area(number);
            let first = area.granule_of(part.first);
            let last = area.granule_of(part.first + (part.pages - PageCount(1)));
            for granule in first..=last {
                self.staging.settled(Place { area: number, granule }, None);
            }
            self.poison(number, first, last - first + 1);
            self.status.tell(Task::PagesFailed(error));
        }
        Flow::Continue(())
    }

    /// Poisons the part of a range that is Missing, without waiting for what is under way.
    ///
    /// A granule is InFlight until the kernel knows: unregistering waits for that, or a page would be let go that only the
    /// map calls poisoned.
    fn poison(&self, area: usize, first: usize, granules: usize) {
        let states = self.memory.states(area);
        for granule in first..first + granules {
            if !states.claim_missing(granule) {
                continue;
            }
            let poisoned = self.memory.poison_in_kernel(Place { area, granule }, || self.blocked());
            let state = if poisoned { State::Poisoned } else { State::Missing };
            let was = states.settle(granule, state);
            if was.requested && poisoned {
                self.answered(self.memory.area(area).granule.0);
            }
            if was.met {
                self.was_met();
            }
        }
    }

    /// The source has delivered everything: what is still Missing is zero, and what is Missing in a huge granule that
    /// came in part.
    fn rest_is_zero(&self) {
        for (number, area) in self.memory.view.areas.iter().enumerate() {
            for granule in 0..area.granules {
                if self.memory.states(number).get(granule).state != State::Missing {
                    continue;
                }
                let in_part = !area.small() && self.staging.gathering(Place { area: number, granule });
                let done = match in_part {
                    true => self.add_piece(number, granule, area.pages(granule, 1), None),
                    false => self.zero_granule(number, granule),
                };
                if done.is_break() {
                    return;
                }
            }
        }
        self.status.tell(Task::Check);
    }
}
