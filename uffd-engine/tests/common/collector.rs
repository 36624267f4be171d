//! A sink that keeps what it gets, and the layouts of frozen memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError};
use page_units::{Layout, PageCount, PageRun, PageSize, RamBlock};
use parking_lot::{Condvar, Mutex};
use testkit::gate::Gate;

use super::PAGE;

/// Collects pages, and notices one that comes twice.
#[derive(Debug)]
pub(crate) struct Collector {
    bytes: Mutex<Vec<Vec<u8>>>,
    seen: Mutex<Vec<Vec<bool>>>,
    end: Mutex<Option<End>>,
    ended: Condvar,
    gate: Option<Gate>,
    fail_at: u64,
    calls: AtomicU64,
}

impl Collector {
    pub(crate) fn new(layout: &Layout, gate: Option<Gate>, fail_at: u64) -> Arc<Collector> {
        let blocks = layout.blocks();
        let pages = |block: &RamBlock| block.length().get() / PAGE;
        Arc::new(Collector {
            bytes: Mutex::new(blocks.iter().map(|block| vec![0xee; block.length().get()]).collect()),
            seen: Mutex::new(blocks.iter().map(|block| vec![false; pages(block)]).collect()),
            end: Mutex::default(),
            ended: Condvar::new(),
            gate,
            fail_at,
            calls: AtomicU64::new(0),
        })
    }

    fn take(&self, run: PageRun, fill: impl Fn(&mut [u8])) -> Reply {
        if let Some(gate) = &self.gate {
            gate.enter();
        }
        if self.calls.fetch_add(1, Ordering::AcqRel) >= self.fail_at {
            return SinkError::stopped("injected").into();
        }
        let mut seen = self.seen.lock();
        for page in run.iter() {
            let once = &mut seen[run.block.0 as usize][page.byte_offset().get() / PAGE];
            assert!(!std::mem::replace(once, true), "page {page} came twice");
        }
        let range = run.first.byte_offset().get()..run.end().byte_offset().get();
        fill(&mut self.bytes.lock()[run.block.0 as usize][range]);
        Reply::Taken
    }

    pub(crate) fn complete(&self) -> bool {
        let mut end = self.end.lock();
        while end.is_none() {
            self.ended.wait(&mut end);
        }
        matches!(*end, Some(End::Complete))
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end.lock().is_some()
    }

    pub(crate) fn assert_equals(&self, expected: &[Vec<u8>]) {
        assert!(self.seen.lock().iter().flatten().all(|&seen| seen), "a page never came");
        for (block, (bytes, expected)) in self.bytes.lock().iter().zip(expected).enumerate() {
            let differs = bytes.chunks(PAGE).zip(expected.chunks(PAGE)).position(|(a, b)| a != b);
            assert_eq!(differs, None, "block {block}: this page is not what it was at the freeze point");
        }
    }
}

impl PageSink for Collector {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        self.take(run, |to| bytes.copy_to(to).unwrap())
    }

    fn zero(&self, run: PageRun) -> Reply {
        self.take(run, |to| to.fill(0))
    }

    fn absent(&self, run: PageRun) -> Reply {
        panic!("{run} is absent")
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        panic!("{run}: {error}")
    }

    fn end(&self, end: End) {
        let before = self.end.lock().replace(end);
        assert!(before.is_none(), "a second end");
        self.ended.notify_all();
    }
}

pub(crate) fn layout(pages: &[u64]) -> Layout {
    let block = |(i, &pages): (usize, &u64)| {
        RamBlock::new(format!("ram{i}"), PageCount(pages).to_bytes(), PageSize::SMALL).unwrap()
    };
    Layout::new(pages.iter().enumerate().map(block).collect()).unwrap()
}
