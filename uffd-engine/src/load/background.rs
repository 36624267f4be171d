//! The threads that bring in what nobody has asked for.

use page_source::{Content, Urgency};
use page_units::{ByteLen, PageCount, PageRun};

use super::intake::Intake;
use super::load::Load;
use super::plan::Cursor;
use super::spans::LOOK_AHEAD;
use super::status::Task;
use crate::EngineError;
use crate::memory::Place;
use crate::serve::placement::bind;
use crate::stats::bump;

/// How many pages from a fault on come next, and at least how many granules.
const AFTER_FAULT: PageCount = PageCount(512);
const GRANULES_AFTER_FAULT: u64 = 8;

impl Load {
    /// The next pages to look at. `None` if the cursor has seen all of them.
    fn next(&self) -> Option<(usize, PageRun)> {
        let memory = &self.intake.memory;
        let mut cursor = self.plan.cursor.lock();
        if let Some(Place { area, granule }) = self.intake.recent_faults.pop() {
            let here = memory.area(area);
            let rest = here.pages(granule, here.granules - granule);
            let following = AFTER_FAULT.0.max(GRANULES_AFTER_FAULT * here.granule.0);
            cursor.following = Some((area, rest.split_at(PageCount(following)).0));
        }
        if let Some((area, run)) = cursor.following.take() {
            // One piece at a time: a pause, a limit or a newer fault counts at once.
            let (now, later) = run.split_at(self.plan.piece.max(memory.area(area).granule));
            cursor.following = (!later.is_empty()).then_some((area, later));
            return Some((area, now));
        }
        loop {
            let area = memory.view.areas.get(cursor.area)?;
            if cursor.granule >= area.granules {
                *cursor = Cursor { area: cursor.area + 1, ..Cursor::default() };
                continue;
            }
            let ahead = area.pages(cursor.granule, area.granules - cursor.granule).split_at(LOOK_AHEAD).0;
            let span = self.pages.content(ahead);
            let granules = ByteLen(span.pages.0 / area.granule.0).get().min(area.granules - cursor.granule);
            match span.content {
                Content::Zero if granules > 0 => {
                    bump(&memory.counters.zero_skipped, granules as u64 * area.granule.0);
                    cursor.granule += granules;
                }
                Content::Zero | Content::Stored | Content::Absent | Content::Unknown => {
                    let take = self.plan.granules(area.granule).min(granules.max(1));
                    let first = cursor.granule;
                    cursor.granule += take;
                    return Some((cursor.area, area.pages(first, take)));
                }
            }
        }
    }

    /// Requests the pages of a run that are Missing, and counts it against the rate.
    fn request_counted(&self, area: usize, run: PageRun) {
        self.plan.asked(self.request(area, run, self.plan.piece));
    }

    /// Requests the pages of a run that are Missing, in runs of at most `piece` pages.
    fn request(&self, number: usize, run: PageRun, piece: PageCount) -> ByteLen {
        let (area, states) = (self.intake.memory.area(number), self.intake.memory.states(number));
        let end = area.granule_of(run.first) + ByteLen(run.pages.0 / area.granule.0).get();
        let most = ByteLen(piece.0 / area.granule.0).get().max(1);
        let mut at = area.granule_of(run.first);
        let mut asked = ByteLen(0);
        while at < end {
            // Asked for already, by a fault or in an earlier turn: it will come.
            let fresh = |granule: &usize| states.request(*granule, false) == Some(false);
            let count = (at..end.min(at + most)).take_while(fresh).count();
            if count == 0 {
                at += 1;
                continue;
            }
            let pages = area.pages(at, count);
            self.intake.window.requested(pages.pages.0);
            self.ask(pages, Urgency::Background);
            asked += pages.len();
            at += count;
        }
        asked
    }

    /// Requests one granule, if it is Missing and nobody has.
    pub(super) fn request_granule(&self, place: Place) {
        let area = self.intake.memory.area(place.area);
        self.request(place.area, area.pages(place.granule, 1), area.granule);
    }

    /// The cursor has seen everything. The last loader to notice has the map checked; all wait for what comes of it.
    fn idle(&self) {
        let last = {
            let mut active = self.plan.active.lock();
            *active -= 1;
            *active == 0
        };
        let Intake { memory, status, window, .. } = &*self.intake;
        if last {
            window.set_all_requested(true);
            if window.none() {
                status.tell(Task::Check);
            }
        }
        let more = || self.plan.cursor.lock().area < memory.view.areas.len();
        while status.running() && !more() {
            window.sleep(None, || !status.running() || more());
        }
        *self.plan.active.lock() += 1;
    }
}

/// Fails the engine if a loader dies.
struct OnExit<'a>(&'a Intake);

impl Drop for OnExit<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.status.fail(EngineError::ThreadDied("a background loader panicked"));
        }
    }
}

/// Runs a loader on this thread until the engine has ended.
pub(crate) fn run(load: &Load, cpu: Option<usize>) {
    let intake = &load.intake;
    let _exit = OnExit(intake);
    bind(cpu);
    let hold = || load.plan.hold(intake.window.room());
    while intake.status.running() {
        if let Some(at_most) = hold() {
            intake.window.sleep(at_most, || !intake.status.running() || hold().is_none());
            continue;
        }
        match load.next() {
            Some((area, run)) => load.request_counted(area, run),
            None => load.idle(),
        }
    }
}
