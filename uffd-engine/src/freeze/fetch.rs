//! Pages that are still missing in frozen memory, straight from the source that it is being loaded from.

use std::sync::Arc;
use std::time::Duration;

use page_source::{
    End, Feed, PageBytes, PageSink, PageSource, Reply, SinkError, SourceError, SourceErrorKind, Subject, Urgency,
};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};

use super::frozen::FrozenError;
use crate::sys::memory::Scratch;

/// So often whoever waits for a source looks whether there still is a point in it.
const LOOK_UP: Duration = Duration::from_millis(20);

/// A flow from the source besides that of the engine.
#[derive(Debug)]
pub(crate) struct Fetch {
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

impl Fetch {
    /// `most`: so much is fetched at a time at most.
    pub(crate) fn start(source: &dyn PageSource, most: ByteLen) -> Result<Fetch, SourceError> {
        let bytes = Scratch::new(most).map_err(|error| SourceError::stopped("no buffer").with_cause(error))?;
        let nothing = PageRun::new(BlockId(0), PageIndex(0), PageCount(0));
        let wanted = Wanted { run: nothing, seen: Vec::new(), left: 0, bytes, error: None };
        let tap = Arc::new(Tap { wanted: Mutex::new(wanted), arrived: Condvar::new() });
        Ok(Fetch { feed: source.start(Arc::clone(&tap) as Arc<dyn PageSink>)?, tap })
    }

    /// Ends the flow: is what was taken still true?
    pub(crate) fn finish(self) -> Result<(), SourceError> {
        self.feed.finish()
    }

    /// The content of `run`, which lies in one block. Waits for it, but not when `over`.
    pub(crate) fn fetch(&self, run: PageRun, to: &mut [u8], over: impl Fn() -> bool) -> Result<(), FrozenError> {
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
                return Err(FrozenError::Source { run, error });
            }
            if wanted.left == 0 {
                to.copy_from_slice(&wanted.bytes.bytes()[..to.len()]);
                return Ok(());
            }
            if over() {
                return Err(FrozenError::Cancelled);
            }
            self.tap.arrived.wait_for(&mut wanted, LOOK_UP);
        }
    }
}

impl Tap {
    /// Takes what of `run` is wanted and has not come yet.
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
