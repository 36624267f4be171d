//! The sink that looks on.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use page_units::{BlockId, Layout, PageIndex, PageRun};
use parking_lot::{Condvar, Mutex};

use super::{Breach, Page, Rule, Truth};
use crate::{End, PageBytes, PageSink, Reply, SinkError, SourceError, is_zero};

/// How many calls may follow `Stop`: what other threads have under way, and what is requested in spite of it.
const AFTER_STOP: u32 = 8;

/// What the sink says to the first run with content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Takes it.
    Takes,
    /// Says that it can't be read.
    Unreadable,
    /// Takes no more.
    Stops,
    /// Panics.
    Panics,
}

/// A sink that compares everything with the truth.
pub(super) struct Witness {
    layout: Layout,
    truth: Truth,
    manner: Manner,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How often each page ended, and how often it failed.
    pages: HashMap<(BlockId, PageIndex), (u32, u32)>,
    ends: Vec<End>,
    /// The first thing that was wrong.
    breach: Option<Breach>,
    /// The feed was finished or dropped.
    gone: bool,
    /// What was said to the first run with content, once there was one.
    said: Option<PageRun>,
    /// How many calls came after `Stop`.
    after_stop: u32,
    stopped: bool,
}

/// How a page came.
enum Came<'a> {
    Data(PageBytes<'a>),
    Zero,
    Absent,
    Failed,
}

impl std::fmt::Debug for Witness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Witness").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Witness {
    pub(super) fn new(layout: &Layout, truth: &Truth, manner: Manner) -> Arc<Witness> {
        let (state, changed) = (Mutex::default(), Condvar::new());
        Arc::new(Witness { layout: layout.clone(), truth: Arc::clone(truth), manner, state, changed })
    }

    /// What was wrong so far.
    pub(super) fn verdict(&self) -> Result<(), Breach> {
        self.state.lock().breach.clone().map_or(Ok(()), Err)
    }

    /// From now on there must be no call.
    pub(super) fn gone(&self) {
        self.state.lock().gone = true;
    }

    /// How often each page of `run` has ended at least.
    pub(super) fn times(&self, run: PageRun) -> u32 {
        let state = self.state.lock();
        run.iter().map(|page| state.pages.get(&(run.block, page)).map_or(0, |(times, _)| *times)).min().unwrap_or(0)
    }

    /// Whether some page has ended more often than once.
    pub(super) fn twice(&self) -> Option<(BlockId, PageIndex)> {
        self.state.lock().pages.iter().find(|(_, (times, _))| *times > 1).map(|(page, _)| *page)
    }

    /// The pages of `run` that have failed.
    pub(super) fn failed(&self, run: PageRun) -> usize {
        let state = self.state.lock();
        run.iter().filter(|page| state.pages.get(&(run.block, *page)).is_some_and(|(_, failed)| *failed > 0)).count()
    }

    /// The run to which the manner was shown.
    pub(super) fn said(&self) -> Option<PageRun> {
        self.state.lock().said
    }

    pub(super) fn ends(&self) -> Vec<End> {
        self.state.lock().ends.clone()
    }

    /// Waits until `over`, at most so long; whether it is.
    pub(super) fn wait(&self, limit: Duration, over: impl Fn(&Witness) -> bool) -> bool {
        let until = Instant::now() + limit;
        loop {
            if over(self) {
                return true;
            }
            let mut state = self.state.lock();
            // What has changed in between is seen at the next look.
            let now = Instant::now();
            if now >= until {
                return false;
            }
            self.changed.wait_for(&mut state, (until - now).min(Duration::from_millis(5)));
        }
    }

    fn take(&self, run: PageRun, came: Came<'_>) -> Reply {
        let mut state = self.state.lock();
        if state.stopped {
            state.after_stop += 1;
        }
        let judged = self.judge(&state, run, &came);
        if let Err(breach) = judged {
            state.breach.get_or_insert(breach);
            self.changed.notify_all();
            return SinkError::stopped("a rule was broken").into();
        }
        if state.stopped {
            return SinkError::stopped("enough").into();
        }
        if matches!(came, Came::Data(_)) && self.manner != Manner::Takes && state.said.is_none() {
            state.said = Some(run);
            match self.manner {
                Manner::Takes => {}
                Manner::Unreadable => return Reply::Unreadable(run),
                Manner::Stops => {
                    state.stopped = true;
                    self.changed.notify_all();
                    return SinkError::stopped("enough").into();
                }
                Manner::Panics => {
                    drop(state);
                    panic!("the sink panics, as it was told to");
                }
            }
        }
        let failed = u32::from(matches!(came, Came::Failed));
        for page in run.iter() {
            let ended = state.pages.entry((run.block, page)).or_default();
            *ended = (ended.0 + 1, ended.1 + failed);
        }
        self.changed.notify_all();
        Reply::Taken
    }

    fn judge(&self, state: &State, run: PageRun, came: &Came<'_>) -> Result<(), Breach> {
        if state.gone {
            return Err(Rule::CallAfterDrop.breach(format_args!("{run} came after the feed was gone")));
        }
        if !state.ends.is_empty() {
            return Err(Rule::CallAfterEnd.breach(format_args!("{run} came after the end")));
        }
        if state.after_stop > AFTER_STOP {
            return Err(Rule::GoesOnAfterStop.breach(format_args!("{run} and others came after Stop")));
        }
        if run.is_empty() {
            return Err(Rule::EmptyRun.breach(format_args!("{run} came")));
        }
        if !self.layout.contains(run) {
            return Err(Rule::BeyondTheLayout.breach(format_args!("{run} came")));
        }
        let bytes = match came {
            Came::Data(bytes) if bytes.len() != run.len() => {
                return Err(Rule::WrongLength.breach(format_args!("{} bytes came for {run}", bytes.len())));
            }
            Came::Data(bytes) => {
                let mut copy = vec![0; run.len().get()];
                // What can't be read is nobody's fault here.
                bytes.copy_to(&mut copy).ok().map(|()| copy)
            }
            _ => None,
        };
        for (number, page) in run.iter().enumerate() {
            let one = PageRun::single(run.block, page);
            let content = bytes.as_ref().map(|bytes| &bytes[number * 4096..][..4096]);
            self.compare(state, one, came, content)?;
        }
        Ok(())
    }

    fn compare(&self, state: &State, one: PageRun, came: &Came<'_>, content: Option<&[u8]>) -> Result<(), Breach> {
        let wrong = |how: &str| Err(Rule::WrongContent.breach(format_args!("{one}: {how}")));
        match ((self.truth)(one), came) {
            (Page::Content(right), Came::Data(_)) if content.is_some_and(|content| *content != right[..]) => {
                wrong("other bytes came than those that it has")
            }
            (Page::Content(right), Came::Zero) if !is_zero(&right) => wrong("it came as zero, and is not"),
            (Page::Content(_), Came::Absent) => wrong("it came as absent, and has content"),
            // As the sink has said itself.
            (Page::Content(_), Came::Failed) if state.said.is_some() => Ok(()),
            (Page::Content(_), Came::Failed) => wrong("it failed, and has content"),
            (Page::Absent, Came::Zero) => Err(Rule::AbsentAsZero.breach(format_args!("{one} came as zero"))),
            (Page::Absent, Came::Data(_)) => wrong("content came, and there is none"),
            (Page::Fails, Came::Data(_) | Came::Zero | Came::Absent) => wrong("it should fail"),
            _ => Ok(()),
        }
    }
}

impl PageSink for Witness {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.take(run, Came::Data(bytes))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(run, Came::Zero)
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.take(run, Came::Absent)
    }

    fn failed(&self, run: PageRun, _: SourceError) -> Reply {
        self.take(run, Came::Failed)
    }

    fn end(&self, end: End) {
        let mut state = self.state.lock();
        let breach = match state.ends.first() {
            Some(first) => Some(Rule::TwoEnds.breach(format_args!("after {first:?} came {end:?}"))),
            None if state.gone => Some(Rule::NoEnd.breach("it came only after the feed was gone")),
            None => None,
        };
        state.breach = state.breach.take().or(breach);
        state.ends.push(end);
        self.changed.notify_all();
    }
}
