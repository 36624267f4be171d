//! Content of huge granules, whole or in pieces.

use std::sync::Arc;

use page_source::{PageBytes, Reply};
use page_units::{PageCount, PageRun};

use super::huge::{Added, NotAdded, Whole};
use super::install::{Claim, Content};
use super::intake::{Flow, Intake, stopped};
use crate::EngineError;
use crate::memory::Place;
use crate::memory::states::State;
use crate::pause::PausePoint;

impl Intake {
    /// Pieces of huge granules.
    pub(super) fn gather(&self, number: usize, part: PageRun, bytes: Option<PageBytes<'_>>) -> Flow {
        let area = self.memory.area(number);
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
        let area = self.memory.area(number);
        let place = Place { area: number, granule };
        loop {
            let gate = self.memory.view.installing();
            match self.staging.unless_gathering(place, || self.memory.states(number).claim(granule)) {
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

    pub(super) fn add_piece(&self, number: usize, granule: usize, here: PageRun, piece: Option<PageBytes<'_>>) -> Flow {
        let area = self.memory.area(number);
        let place = Place { area: number, granule };
        let alias = area.region.alias.map(|alias| alias + area.len_of(granule));
        let first = here.first - area.page(granule);
        self.memory.pauses.at(PausePoint::Piece);
        // What is put together in the file is written there: only by the thread that has claimed it, as any install.
        let added = loop {
            let gate = alias.is_some().then(|| self.memory.view.installing());
            let take = || match (&gate, self.memory.states(number).get(granule).state) {
                (None, State::Missing | State::Zero) => Ok(None),
                (Some(_), _) if self.memory.states(number).claim(granule) => Ok(Some(Claim::of(self, place))),
                // A thread that reads events may be waited for.
                (Some(_), State::InFlight) if self.status.running() && !self.memory.view.on_reader_thread() => {
                    Err(Added::Busy)
                }
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
        let mut done = Flow::Continue(());
        loop {
            let gate = self.memory.view.installing();
            if !self.memory.states(place.area).claim(place.granule) {
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
}

/// A number of pages that are in memory.
pub(super) fn count(pages: PageCount) -> usize {
    page_units::ByteLen(pages.0).get()
}
