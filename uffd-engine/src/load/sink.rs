//! The engine as a sink of pages.

use std::sync::Arc;

use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError, SourceErrorKind, Subject};
use page_units::{PageCount, PageRun};

use crate::EngineError;
use crate::load::huge::{Added, NotAdded, Whole};
use crate::load::install::{Claim, Content, Flow, stopped};
use crate::load::status::Task;
use crate::memory::states::State;
use crate::memory::{Memory, Place};
use crate::options::FailurePolicy;
use crate::pause::PausePoint;
use crate::stats::bump;

impl PageSink for Memory {
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

impl Memory {
    fn take_data(&self, run: PageRun, bytes: PageBytes<'_>) -> Flow {
        if bytes.len() != run.len() {
            let reason = format!("{} bytes were delivered for {run}", bytes.len());
            let error = SourceError::new(SourceErrorKind::Protocol, Subject::none().run(run), reason.clone());
            self.status.fail(self.source_error(run, error));
            return Flow::Break(SinkError::Stopped { reason }.into());
        }
        for (number, part) in self.parts(run) {
            if !self.status.running() {
                return Flow::Break(stopped());
            }
            let bytes = bytes.slice((part.first - run.first).to_bytes(), part.len());
            let area = &self.areas[number];
            if area.small() {
                self.install_bytes(number, area.granule_of(part.first), count(part.pages), bytes)?;
            } else {
                self.gather(number, part, Some(bytes))?;
            }
        }
        Flow::Continue(())
    }

    fn take_zero(&self, run: PageRun) -> Flow {
        for (number, part) in self.parts(run) {
            if !self.status.running() {
                return Flow::Break(stopped());
            }
            if self.areas[number].small() {
                for page in part.iter() {
                    self.zero_granule(number, self.areas[number].granule_of(page))?;
                }
            } else {
                self.gather(number, part, None)?;
            }
        }
        Flow::Continue(())
    }

    fn take_failed(&self, run: PageRun, error: &SourceError) -> Flow {
        for (number, part) in self.parts(run) {
            if !self.status.running() {
                return Flow::Break(stopped());
            }
            let error = self.source_error(part, error.clone());
            if self.policy == FailurePolicy::PoisonMissing {
                self.status.fail(error);
                return Flow::Break(stopped());
            }
            self.status.pages_fail(&error);
            let area = &self.areas[number];
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

    /// An error that the source gave for some pages.
    fn source_error(&self, run: PageRun, error: SourceError) -> EngineError {
        let area = self.areas.iter().find(|area| area.block() == run.block);
        EngineError::Source { block: area.map(|area| Arc::clone(&area.name)).unwrap_or_default(), run, error }
    }

    /// One granule is zero. Installed only if somebody waits for it.
    fn zero_granule(&self, number: usize, granule: usize) -> Flow {
        let area = &self.areas[number];
        let was = area.states.mark_zero(granule);
        if was.state != State::Missing {
            self.not_taken(number, granule);
            return Flow::Continue(());
        }
        if was.wanted {
            self.wanted_zero(Place { area: number, granule })?;
        } else {
            bump(&self.counters.zero_skipped, area.granule.0);
        }
        if was.requested {
            self.answered(area.granule.0);
        }
        Flow::Continue(())
    }

    fn wanted_zero(&self, place: Place) -> Flow {
        loop {
            let gate = self.installing();
            if !self.areas[place.area].states.claim_zero(place.granule) {
                return Flow::Continue(());
            }
            let done = self.install_zeros(&gate, place, 1);
            drop(gate);
            match done {
                Ok(0) => self.blocked(),
                Ok(_) => return Flow::Continue(()),
                Err(error) => return Flow::Break(error),
            }
        }
    }

    /// Pieces of huge granules.
    fn gather(&self, number: usize, part: PageRun, bytes: Option<PageBytes<'_>>) -> Flow {
        let area = &self.areas[number];
        let mut rest = part;
        while !rest.is_empty() {
            let granule = area.granule_of(rest.first);
            let whole = area.pages(granule, 1);
            let (here, after) = rest.split_at(whole.end() - rest.first);
            let piece = bytes.map(|bytes| bytes.slice((here.first - part.first).to_bytes(), here.len()));
            rest = after;
            if here == whole && !self.staging.gathering(Place { area: number, granule }) {
                match piece {
                    Some(piece) => self.install_huge(number, granule, piece)?,
                    None => self.zero_granule(number, granule)?,
                }
                continue;
            }
            self.add_piece(number, granule, here, piece)?;
        }
        Flow::Continue(())
    }

    /// A huge granule whose content came in one piece.
    fn install_huge(&self, number: usize, granule: usize, bytes: PageBytes<'_>) -> Flow {
        let area = &self.areas[number];
        let place = Place { area: number, granule };
        loop {
            let gate = self.installing();
            match self.staging.unless_gathering(place, || area.states.claim(granule)) {
                Some(true) => {}
                Some(false) => {
                    self.not_taken(number, granule);
                    return Flow::Continue(());
                }
                // Somebody has just begun: what there is of it in the file must not be mapped as it is.
                None => {
                    drop(gate);
                    return self.add_piece(number, granule, area.pages(granule, 1), Some(bytes));
                }
            }
            let installed = self.install(&gate, place, 1, Content::Bytes(bytes));
            drop(gate);
            match installed {
                Ok(0) => self.blocked(),
                Ok(_) => return Flow::Continue(()),
                Err(error) => return Flow::Break(error),
            }
        }
    }

    fn add_piece(&self, number: usize, granule: usize, here: PageRun, piece: Option<PageBytes<'_>>) -> Flow {
        let area = &self.areas[number];
        let place = Place { area: number, granule };
        let alias = area.region.alias.map(|alias| alias + area.len_of(granule));
        let first = here.first - area.page(granule);
        self.pauses.at(PausePoint::Piece);
        // What is put together in the file is written there: only by whoever has claimed it, as any install.
        let added = loop {
            let gate = alias.is_some().then(|| self.installing());
            let take = || match (&gate, area.states.get(granule).state) {
                (None, State::Missing | State::Zero) => Ok(None),
                (Some(_), _) if area.states.claim(granule) => Ok(Some(Claim::of(self, place))),
                // Whoever reads events may be waited for.
                (Some(_), State::InFlight) if self.status.running() && !self.on_reader_thread() => Err(Added::Busy),
                _ => Err(Added::NotTaken),
            };
            let added = self.staging.add(place, count(first), count(here.pages), piece, alias, take);
            drop(gate);
            match added {
                Ok(Added::Busy) => std::thread::yield_now(),
                added => break added,
            }
        };
        match added {
            Ok(Added::Part) => Flow::Continue(()),
            Ok(Added::Whole(content)) => self.install_whole(place, content),
            Ok(Added::NotTaken | Added::Busy) => {
                self.not_taken(number, granule);
                Flow::Continue(())
            }
            Err(NotAdded::Unreadable) => Flow::Break(Reply::Unreadable(here)),
            Err(NotAdded::NoRoom(error)) => {
                let (block, error) = (Arc::clone(&area.name), Arc::new(error));
                self.status.fail(EngineError::Staging { block, run: here, error });
                Flow::Break(stopped())
            }
        }
    }

    fn install_whole(&self, place: Place, content: Whole) -> Flow {
        let area = &self.areas[place.area];
        let mut done = Flow::Continue(());
        loop {
            let gate = self.installing();
            if !area.states.claim(place.granule) {
                self.not_taken(place.area, place.granule);
                break;
            }
            let installed = match &content {
                Whole::Buffer(buffer) => {
                    self.install(&gate, place, 1, Content::Bytes(PageBytes::from_slice(buffer.bytes())))
                }
                Whole::InFile => self.install(&gate, place, 1, Content::Gathered),
            };
            drop(gate);
            match installed {
                Ok(0) => self.blocked(),
                Ok(_) => break,
                Err(error) => {
                    done = Flow::Break(error);
                    break;
                }
            }
        }
        let buffer = match content {
            Whole::Buffer(buffer) => Some(buffer),
            Whole::InFile => None,
        };
        self.staging.settled(place, buffer);
        done
    }

    /// The source has delivered everything: what is still Missing is zero, and what is Missing in a huge granule that
    /// came in part.
    fn rest_is_zero(&self) {
        for (number, area) in self.areas.iter().enumerate() {
            for granule in 0..area.states.len() {
                if area.states.get(granule).state != State::Missing {
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

/// A number of pages that are in memory.
fn count(pages: PageCount) -> usize {
    page_units::ByteLen(pages.0).get()
}
