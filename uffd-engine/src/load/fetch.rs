//! What a freeze asks of the load: where the content of missing pages is, and that content, straight from the source.

use std::sync::{Arc, Weak};
use std::time::Duration;

use page_source::{
    Content, End, Feed, PageBytes, PageSink, PageSource, Pages, Reply, SinkError, SourceError, SourceErrorKind,
    Subject, Urgency,
};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};

use super::intake::Intake;
use super::load::Load;
use super::status::{Outcome, Task};
use crate::EngineError;
use crate::memory::Place;
use crate::memory::holder::{Fetch, FetchError, MissingContent};
use crate::memory::states::State;
use crate::sys::memory::Scratch;

/// How much is fetched at a time at most.
const MOST: ByteLen = ByteLen(2 << 20);

/// The load of a memory that is frozen.
#[derive(Debug)]
pub(crate) struct Source {
    intake: Arc<Intake>,
    pages: Arc<dyn Pages>,
    /// The source, if it may be started again.
    again: Option<Arc<dyn PageSource>>,
    /// The engine's own flow: it ends with the engine.
    load: Weak<Load>,
    flow: Mutex<Option<Refetch>>,
}

impl Source {
    pub(crate) fn of(load: &Arc<Load>) -> Source {
        Source {
            intake: Arc::clone(&load.intake),
            pages: Arc::clone(&load.pages),
            again: load.again.clone(),
            load: Arc::downgrade(load),
            flow: Mutex::default(),
        }
    }

    /// Has the engine bring a granule.
    fn request(&self, at: Place) {
        if let Some(load) = self.load.upgrade() {
            load.request_granule(at);
        }
    }

    /// Maps what the file behind shared memory holds.
    fn map(&self, at: Place) -> MissingContent {
        let mapped = self.intake.map_cached(&self.intake.memory.view.installing(), at);
        if mapped == Some(true) { MissingContent::Mapped } else { MissingContent::Soon }
    }
}

impl Fetch for Source {
    fn running(&self) -> bool {
        self.intake.status.running()
    }

    fn complete(&self) -> Result<(), EngineError> {
        match self.intake.status.wait(None) {
            Some(Outcome::Complete(_)) => Ok(()),
            Some(Outcome::Failed(error)) => Err(error),
            None => Err(EngineError::OnObserver),
        }
    }

    fn missing(&self, at: Place, in_file: bool) -> MissingContent {
        let area = self.intake.memory.area(at.area);
        let missing = self.intake.memory.states(at.area).get(at.granule).state == State::Missing;
        let span = self.pages.content(area.pages(at.granule, 1));
        let zero = span.content == Content::Zero && span.pages >= area.granule;
        if in_file && !self.intake.staging.gathering(at) {
            // What the file holds of a page that the source has content for is content only if it was put there on purpose.
            // The engine finds out.
            if !missing || zero || self.intake.prefilled {
                return self.map(at);
            }
            self.request(at);
            return MissingContent::Soon;
        }
        if zero {
            return MissingContent::Zero;
        }
        if self.again.is_some() {
            return MissingContent::Source;
        }
        self.request(at);
        MissingContent::Soon
    }

    fn fetch(&self, run: PageRun, to: &mut [u8], over: &dyn Fn() -> bool) -> Result<(), FetchError> {
        let Some(source) = &self.again else {
            return Err(FetchError::Source(SourceError::stopped("the source can't be asked again")));
        };
        let mut flow = self.flow.lock();
        let flow = match &mut *flow {
            Some(flow) => flow,
            none => none.insert(Refetch::start(&**source, MOST).map_err(FetchError::Source)?),
        };
        flow.fetch(run, to, over)
    }

    fn vouch(&self) -> Result<(), SourceError> {
        let Some(source) = &self.again else { return Ok(()) };
        let flow = match self.flow.lock().take() {
            Some(flow) => flow,
            None => Refetch::start(&**source, MOST)?,
        };
        flow.feed.finish()
    }

    fn freeze_ended(&self, thaw: bool) {
        self.intake.status.tell(if thaw { Task::Thaw } else { Task::Check });
    }
}

/// How often a thread that waits for the source checks whether the freeze has ended.
const LOOK_UP: Duration = Duration::from_millis(20);

/// A flow from the source besides that of the engine.
#[derive(Debug)]
struct Refetch {
    // First: no call into the tap after this.
    feed: Box<dyn Feed>,
    tap: Arc<Tap>,
}

/// What is being waited for.
#[derive(Debug)]
struct Tap {
    wanted: Mutex<Wanted>,
    arrived: Condvar,
}

#[derive(Debug)]
struct Wanted {
    run: PageRun,
    seen: Vec<bool>,
    left: usize,
    bytes: Scratch,
    error: Option<SourceError>,
}

impl Refetch {
    /// `most`: how much is fetched at a time at most.
    fn start(source: &dyn PageSource, most: ByteLen) -> Result<Refetch, SourceError> {
        let bytes = Scratch::new(most).map_err(|error| SourceError::stopped("no buffer").with_cause(error))?;
        let nothing = PageRun::new(BlockId(0), PageIndex(0), PageCount(0));
        let wanted = Wanted { run: nothing, seen: Vec::new(), left: 0, bytes, error: None };
        let tap = Arc::new(Tap { wanted: Mutex::new(wanted), arrived: Condvar::new() });
        Ok(Refetch { feed: source.start(Arc::clone(&tap) as Arc<dyn PageSink>)?, tap })
    }

    /// The content of `run`, which lies in one block. Waits for it, but not when `over`.
    fn fetch(&self, run: PageRun, to: &mut [u8], over: &dyn Fn() -> bool) -> Result<(), FetchError> {
        let pages = ByteLen(run.pages.0).get();
        {
            let mut wanted = self.tap.wanted.lock();
            wanted.run = run;
            wanted.seen = vec![false; pages];
            wanted.left = pages;
        }
        self.feed.request(run, Urgency::Background);
        let mut wanted = self.tap.wanted.lock();
        loop {
            if let Some(error) = wanted.error.take() {
                return Err(FetchError::Source(error));
            }
            if wanted.left == 0 {
                to.copy_from_slice(&wanted.bytes.bytes()[..to.len()]);
                return Ok(());
            }
            if over() {
                return Err(FetchError::Over);
            }
            self.tap.arrived.wait_for(&mut wanted, LOOK_UP);
        }
    }
}

impl Tap {
    /// Takes the pages of `run` that are wanted and have not come yet.
    fn take(&self, run: PageRun, bytes: Option<PageBytes<'_>>) -> Reply {
        let mut wanted = self.wanted.lock();
        let here = run.intersect(wanted.run);
        for page in here.iter() {
            let number = ByteLen((page - wanted.run.first).0).get();
            if wanted.seen[number] {
                continue;
            }
            let one = PageRun::single(run.block, page);
            let at = (page - wanted.run.first).to_bytes().get();
            let to = wanted.bytes.bytes_mut(at, one.len().get());
            match bytes.map(|bytes| bytes.slice((page - run.first).to_bytes(), one.len()).copy_to(to)) {
                None => to.fill(0),
                Some(Ok(())) => {}
                Some(Err(_)) => return Reply::Unreadable(one),
            }
            wanted.seen[number] = true;
            wanted.left -= 1;
        }
        if wanted.left == 0 {
            self.arrived.notify_all();
        }
        Reply::Taken
    }

    fn fail(&self, error: SourceError) {
        self.wanted.lock().error.get_or_insert(error);
        self.arrived.notify_all();
    }
}

impl PageSink for Tap {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        if bytes.len() != run.len() {
            let reason = format!("{} bytes were delivered for {run}", bytes.len());
            self.fail(SourceError::new(SourceErrorKind::Protocol, Subject::none().run(run), reason.clone()));
            return SinkError::Stopped { reason }.into();
        }
        self.take(run, Some(bytes))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(run, None)
    }

    fn absent(&self, run: PageRun) -> Reply {
        let error = SinkError::Absent(run);
        self.failed(run, SourceError::new(SourceErrorKind::Corrupt, Subject::none().run(run), error.to_string()))
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        if !self.wanted.lock().run.intersect(run).is_empty() {
            self.fail(error);
        }
        Reply::Taken
    }

    fn end(&self, end: End) {
        match end {
            End::Complete => {
                let rest = self.wanted.lock().run;
                let _ = self.take(rest, None);
            }
            End::Broken(error) => self.fail(error),
            End::Stopped => {
                let subject = Subject::peer("the source of the pages");
                self.fail(SourceError::new(SourceErrorKind::PeerGone, subject, "it has stopped answering"));
            }
        }
    }
}
