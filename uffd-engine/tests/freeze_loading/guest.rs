//! A guest that writes while its memory is loaded and frozen.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use page_units::{BlockId, ByteLen, PageIndex};
use parking_lot::{Mutex, RwLock};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::oracle::Oracle;
use uffd_engine::{Engine, FreezeError, FreezeOptions, Frozen};

use crate::common::{Memory, PAGE};

/// A guest: threads that write all over the memory, and a model of what the memory is.
pub(crate) struct Guest<'a> {
    memory: &'a Memory,
    pub(crate) model: Mutex<Vec<Vec<u8>>>,
    /// Held by a writer for the time of one write; alone by the thread that stops the guest.
    running: RwLock<()>,
    over: AtomicBool,
    writes: AtomicU64,
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl<'a> Guest<'a> {
    pub(crate) fn new(memory: &'a Memory, oracle: &Oracle) -> Guest<'a> {
        let blocks = (0..).zip(memory.layout.blocks());
        let model = blocks.map(|(id, _)| oracle.block(BlockId(id)).to_vec()).collect();
        let model = Mutex::new(model);
        Guest { memory, model, running: RwLock::new(()), over: AtomicBool::new(false), writes: AtomicU64::new(0) }
    }

    /// Runs `body` while two vCPUs write.
    pub(crate) fn runs(&self, seed: u64, body: impl FnOnce()) {
        std::thread::scope(|scope| {
            for vcpu in 0..2 {
                scope.spawn(move || {
                    let mut random = StdRng::seed_from_u64(seed * 2 + vcpu);
                    let runs: Vec<_> = self.memory.layout.runs().filter(|run| !run.is_empty()).collect();
                    while !self.over.load(Ordering::Acquire) {
                        let run = runs[random.random_range(0..runs.len())];
                        // Each has pages of its own: then the order of writes is that of the model.
                        let page = random.random_range(0..run.pages.0 / 2) * 2 + vcpu;
                        self.write(run.block, PageIndex(page), random.random());
                    }
                });
            }
            let _over = Over(&self.over);
            body();
        });
    }

    pub(crate) fn write(&self, block: BlockId, page: PageIndex, value: u64) {
        let _running = self.running.read_recursive();
        self.memory.store(block, page, &value.to_le_bytes());
        let at = page.byte_offset().get();
        self.model.lock()[block.0 as usize][at..at + 8].copy_from_slice(&value.to_le_bytes());
        self.writes.fetch_add(1, Ordering::AcqRel);
    }

    /// Waits until a number of further writes were made.
    pub(crate) fn progress(&self, writes: u64) {
        let until = self.writes.load(Ordering::Acquire) + writes;
        while self.writes.load(Ordering::Acquire) < until {
            std::thread::yield_now();
        }
    }

    /// Stops the guest, freezes its memory, and lets it go on. With what the memory was then.
    pub(crate) fn freeze(&self, engine: &Engine, pool: ByteLen) -> (Result<Frozen, FreezeError>, Vec<Vec<u8>>) {
        let options = FreezeOptions::default().with_pool(pool);
        let freezer = engine.freezer(self.memory.regions(), self.memory.layout.clone(), &options);
        let _stopped = self.running.write();
        let frozen = freezer.and_then(|freezer| freezer.arm());
        (frozen, self.model.lock().clone())
    }

    /// These pages of the first block, and no others.
    pub(crate) fn assert_memory_of(&self, pages: &[PageIndex]) {
        for &page in pages {
            let at = page.byte_offset().get();
            assert!(self.memory.load(BlockId(0), page) == self.model.lock()[0][at..at + PAGE], "memory at page {page}");
        }
    }

    pub(crate) fn assert_memory(&self) {
        for (block, model) in (0..).map(BlockId).zip(&*self.model.lock()) {
            for (number, page) in model.chunks(PAGE).enumerate() {
                let index = PageIndex(number as u64);
                assert!(self.memory.load(block, index) == page, "memory at page {number} of block {}", block.0);
            }
        }
    }
}
