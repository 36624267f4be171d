//! A sink that keeps everything it is given.

use std::collections::BTreeMap;
use std::sync::Arc;

use page_source::{End, PageBytes, PageSink, Reply, SourceError};
use page_units::{BlockId, Layout, PageIndex, PageRun};
use parking_lot::Mutex;

/// What became of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Got {
    /// Content.
    Data(Vec<u8>),
    /// It is zero.
    Zero,
    /// The source has nothing to say.
    Absent,
    /// Its content is not there: why.
    Failed(String),
}

/// What was given so far.
#[derive(Debug, Default)]
pub struct Collected {
    /// Every time a page ended, in order.
    pub pages: BTreeMap<(BlockId, PageIndex), Vec<Got>>,
    /// The runs as they came.
    pub runs: Vec<(PageRun, &'static str)>,
    /// How the flow ended, each time it was said.
    pub ends: Vec<End>,
}

type Hook = Box<dyn Fn(PageRun) -> Reply + Send + Sync>;

/// Collects. `hook` is called before each run is taken.
#[derive(Default)]
pub struct Collector {
    /// What was given so far.
    pub state: Mutex<Collected>,
    hook: Option<Hook>,
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Collector")
    }
}

impl Collector {
    /// Takes everything.
    pub fn new() -> Arc<Collector> {
        Arc::default()
    }

    /// Asks `hook` before it takes a run.
    pub fn with_hook(hook: impl Fn(PageRun) -> Reply + Send + Sync + 'static) -> Arc<Collector> {
        Arc::new(Collector { state: Mutex::default(), hook: Some(Box::new(hook)) })
    }

    fn take(&self, run: PageRun, kind: &'static str, got: impl Fn(usize) -> Got) -> Reply {
        assert!(!run.is_empty());
        if let Some(hook) = &self.hook {
            match hook(run) {
                Reply::Taken => {}
                reply => return reply,
            }
        }
        let mut state = self.state.lock();
        state.runs.push((run, kind));
        for (i, page) in run.iter().enumerate() {
            state.pages.entry((run.block, page)).or_default().push(got(i));
        }
        Reply::Taken
    }

    /// How the page ended, if it did so exactly once.
    pub fn once(&self, block: u32, page: u64) -> Got {
        let state = self.state.lock();
        let all = state.pages.get(&(BlockId(block), PageIndex(page))).expect("the page ended");
        assert_eq!(all.len(), 1, "page {page} of block {block} ended {} times", all.len());
        all[0].clone()
    }

    /// The content of a block, each of whose pages ended exactly once, in data or zero.
    pub fn content(&self, layout: &Layout, block: BlockId) -> Vec<u8> {
        let mut all = Vec::new();
        for page in layout.run_of(block).unwrap().iter() {
            match self.once(block.0, page.0) {
                Got::Data(bytes) => all.extend(bytes),
                Got::Zero => all.extend([0; 4096]),
                Got::Absent => panic!("page {page} is absent"),
                Got::Failed(why) => panic!("page {page} failed: {why}"),
            }
        }
        all
    }

    /// Why pages failed.
    pub fn failures(&self) -> Vec<String> {
        let state = self.state.lock();
        let all = state.pages.values().flatten();
        all.filter_map(|got| if let Got::Failed(why) = got { Some(why.clone()) } else { None }).collect()
    }
}

impl PageSink for Collector {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        assert_eq!(bytes.len(), run.len());
        let mut content = vec![0; bytes.len().get()];
        if bytes.copy_to(&mut content).is_err() {
            return Reply::Unreadable(run);
        }
        self.take(run, "data", |i| Got::Data(content[i * 4096..][..4096].to_vec()))
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(run, "zero", |_| Got::Zero)
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.take(run, "absent", |_| Got::Absent)
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        self.take(run, "failed", |_| Got::Failed(error.to_string()))
    }

    fn end(&self, end: End) {
        self.state.lock().ends.push(end);
    }
}
