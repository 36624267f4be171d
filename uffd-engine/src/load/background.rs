//! The threads that bring in what nobody has asked for: around recent faults first, then the rest in order.
//!
//! The cursor only decides where to look next. Whether everything is there is read from the page states.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use page_source::{Content, Urgency};
use page_units::{ByteLen, PageCount, PageRun};
use parking_lot::{Mutex, MutexGuard};

use crate::EngineError;
use crate::load::fault::Origin;
use crate::load::status::Task;
use crate::memory::{Memory, Place};
use crate::options::Background;
use crate::serve::placement::bind;
use crate::stats::bump;

/// How far the source is asked at a time what it knows: 1 GiB.
const LOOK_AHEAD: PageCount = PageCount(1 << 18);

/// After a fault, so many pages from there on come next, and at least so many granules.
const AFTER_FAULT: PageCount = PageCount(512);
const GRANULES_AFTER_FAULT: u64 = 8;
/// A pause of a loader whose rate is limited ends at least this often, to look for a change.
const NAP: Duration = Duration::from_millis(5);

/// What the loaders of one engine share.
#[derive(Debug)]
pub(crate) struct Plan {
    cursor: Mutex<Cursor>,
    paused: AtomicBool,
    piece: PageCount,
    rate: Option<Mutex<Bucket>>,
    active: Mutex<usize>,
}

#[derive(Debug, Default)]
struct Cursor {
    area: usize,
    granule: usize,
    /// What comes after the latest fault.
    following: Option<(usize, PageRun)>,
}

/// A token bucket: it may be overdrawn by one piece, and is then paid back by waiting.
#[derive(Debug)]
struct Bucket {
    per_second: f64,
    bytes: f64,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, len: ByteLen) {
        self.refill();
        self.bytes -= to_f64(len.0);
    }

    fn refill(&mut self) {
        let now = Instant::now();
        let most = self.per_second / 100.0;
        self.bytes = (self.bytes + self.per_second * (now - self.at).as_secs_f64()).min(most);
        self.at = now;
    }

    fn debt(&mut self) -> Option<Duration> {
        self.refill();
        (self.bytes < 0.0).then(|| Duration::from_secs_f64((-self.bytes / self.per_second).min(3600.0)))
    }
}

/// Exact up to 2^53, which is more than any rate.
#[expect(clippy::cast_precision_loss, reason = "a rate needs no more than 53 bits")]
fn to_f64(n: u64) -> f64 {
    n as f64
}

impl Plan {
    pub(crate) fn new(options: &Background) -> Plan {
        Plan {
            cursor: Mutex::default(),
            paused: AtomicBool::new(options.paused),
            piece: options.piece,
            rate: options
                .rate
                .map(|rate| Mutex::new(Bucket { per_second: to_f64(rate.0.max(1)), bytes: 0.0, at: Instant::now() })),
            active: Mutex::new(options.threads),
        }
    }

    pub(crate) fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// Begins again at the start: something was still missing.
    pub(crate) fn rewind(&self) {
        *self.cursor.lock() = Cursor::default();
    }

    /// The next pages to look at. `None` if the cursor has seen all of them.
    fn next(&self, core: &Memory, origin: &Origin) -> Option<(usize, PageRun)> {
        let mut cursor = self.cursor.lock();
        if let Some(Place { area, granule }) = core.recent_faults.pop() {
            let rest = core.areas[area].pages(granule, core.areas[area].states.len() - granule);
            let following = AFTER_FAULT.0.max(GRANULES_AFTER_FAULT * core.areas[area].granule.0);
            cursor.following = Some((area, rest.split_at(PageCount(following)).0));
        }
        if let Some((area, run)) = cursor.following.take() {
            // One piece at a time: a pause, a limit or a newer fault counts at once.
            let (now, later) = run.split_at(self.piece.max(core.areas[area].granule));
            cursor.following = (!later.is_empty()).then_some((area, later));
            return Some((area, now));
        }
        // Once the source has been asked for a page: whether it knew no more after that than before.
        let mut asked = None;
        loop {
            let area = core.areas.get(cursor.area)?;
            if cursor.granule >= area.states.len() {
                *cursor = Cursor { area: cursor.area + 1, ..Cursor::default() };
                continue;
            }
            let page = area.page(cursor.granule);
            let ahead = area.pages(cursor.granule, area.states.len() - cursor.granule).split_at(LOOK_AHEAD).0;
            let span = origin.pages.content(ahead);
            let granules = ByteLen(span.pages.0 / area.granule.0).get().min(area.states.len() - cursor.granule);
            match span.content {
                Content::Zero if granules > 0 => {
                    bump(&core.counters.zero_skipped, granules as u64 * area.granule.0);
                    cursor.granule += granules;
                }
                // What a source does not know before it was asked is often known for a long way after one page.
                Content::Unknown if asked.is_none() && area.small() => {
                    let one = PageRun::single(area.block(), page);
                    let number = cursor.area;
                    cursor.granule += 1;
                    // Others go on meanwhile, and whoever has to begin again does not wait for a source that hangs.
                    let ask = || self.unknown_stays_unknown(core, origin, number, one);
                    asked = Some(MutexGuard::unlocked(&mut cursor, ask));
                }
                Content::Zero | Content::Stored | Content::Absent | Content::Unknown => {
                    // With the page that was asked for before, one turn: also where that has told of no other page.
                    let most = match (asked, span.content) {
                        (Some(false), Content::Unknown) => 1,
                        _ => self.granules(area.granule) - usize::from(asked.is_some()),
                    };
                    let take = most.clamp(1, granules.max(1));
                    let first = cursor.granule;
                    cursor.granule += take;
                    return Some((cursor.area, area.pages(first, take)));
                }
            }
        }
    }

    /// Asks for one page; `true` if the source does not know more after that than before.
    fn unknown_stays_unknown(&self, core: &Memory, origin: &Origin, area: usize, one: PageRun) -> bool {
        self.request(core, origin, area, one);
        origin.pages.content(one).content == Content::Unknown
    }

    /// One turn of a loader, in granules.
    fn granules(&self, granule: PageCount) -> usize {
        ByteLen(self.piece.0 / granule.0).get().max(1)
    }

    /// Requests what of a run is Missing, and counts it against the rate.
    fn request(&self, core: &Memory, origin: &Origin, area: usize, run: PageRun) {
        let asked = request(core, origin, area, run, self.piece);
        if let Some(rate) = &self.rate {
            rate.lock().take(asked);
        }
    }

    /// Why a loader has to wait now, if it has: for how long at most.
    fn hold(&self, core: &Memory) -> Option<Option<Duration>> {
        if self.paused.load(Ordering::SeqCst) || !core.window.room() {
            return Some(None);
        }
        let debt = self.rate.as_ref()?.lock().debt()?;
        Some(Some(debt.min(NAP)))
    }
}

/// Requests what of a run is Missing, in runs of at most `piece` pages.
fn request(core: &Memory, origin: &Origin, number: usize, run: PageRun, piece: PageCount) -> ByteLen {
    let area = &core.areas[number];
    let end = area.granule_of(run.first) + ByteLen(run.pages.0 / area.granule.0).get();
    let most = ByteLen(piece.0 / area.granule.0).get().max(1);
    let mut at = area.granule_of(run.first);
    let mut asked = ByteLen(0);
    while at < end {
        // Asked for already, by a fault or in an earlier turn: it will come.
        let fresh = |granule: &usize| area.states.request(*granule, false) == Some(false);
        let count = (at..end.min(at + most)).take_while(fresh).count();
        if count == 0 {
            at += 1;
            continue;
        }
        let pages = area.pages(at, count);
        core.window.requested(pages.pages.0);
        origin.request(&core.status, pages, Urgency::Background);
        asked += pages.len();
        at += count;
    }
    asked
}

/// Requests one granule, if it is Missing and nobody has.
pub(crate) fn request_granule(core: &Memory, origin: &Origin, place: Place) {
    let granule = core.areas[place.area].granule;
    request(core, origin, place.area, core.areas[place.area].pages(place.granule, 1), granule);
}

/// Fails the engine if a loader dies.
struct Leaving<'a>(&'a Memory);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.status.fail(EngineError::ThreadDied("a background loader panicked"));
        }
    }
}

/// Runs a loader on this thread until the engine has ended.
pub(crate) fn run(core: &Arc<Memory>, plan: &Plan, origin: &Origin, cpu: Option<usize>) {
    let _leaving = Leaving(core);
    bind(cpu);
    while core.status.running() {
        if let Some(at_most) = plan.hold(core) {
            core.window.sleep(at_most, || !core.status.running() || plan.hold(core).is_none());
            continue;
        }
        match plan.next(core, origin) {
            Some((area, run)) => plan.request(core, origin, area, run),
            None => idle(core, plan),
        }
    }
}

/// The cursor has seen everything. The last loader to notice has the map checked; all wait for what comes of it.
fn idle(core: &Memory, plan: &Plan) {
    let last = {
        let mut active = plan.active.lock();
        *active -= 1;
        *active == 0
    };
    if last {
        core.window.set_all_requested(true);
        if core.window.none() {
            core.status.tell(Task::Check);
        }
    }
    let more = || plan.cursor.lock().area < core.areas.len();
    while core.status.running() && !more() {
        core.window.sleep(None, || !core.status.running() || more());
    }
    *plan.active.lock() += 1;
}
