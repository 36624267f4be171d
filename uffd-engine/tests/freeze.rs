//! Frozen memory is exactly what it was at the freeze point, while writers run over it at full speed.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::collector::{Collector, layout};
use common::{Kind, Memory, PAGE};
use page_source::{OneShot, PageSink};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use testkit::gate::Gate;
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::seed::{seed, seeds};
use uffd_engine::{FreezeError, FreezeOptions, Freezer, Frozen, FrozenError, Handlers, PausePoint, StartError};

/// Fills what the oracle has content for: the rest stays a hole.
fn populate(memory: &Memory, oracle: &Oracle) -> Vec<PageRun> {
    let runs: Vec<_> = memory.layout.runs().flat_map(|run| oracle.kinds(run).collect::<Vec<_>>()).collect();
    let stored: Vec<PageRun> = runs.into_iter().filter(|(_, zero)| !zero).map(|(run, _)| run).collect();
    for run in &stored {
        for page in run.iter() {
            memory.store(run.block, page, oracle.run(PageRun::single(run.block, page)));
        }
    }
    stored
}

fn copy_of(memory: &Memory, exists: &[PageRun]) -> Vec<Vec<u8>> {
    let mut copy: Vec<Vec<u8>> = memory.layout.blocks().iter().map(|block| vec![0; block.length().get()]).collect();
    for run in exists {
        for page in run.iter() {
            let at = page.byte_offset().get();
            copy[run.block.0 as usize][at..at + PAGE].copy_from_slice(&memory.load(run.block, page));
        }
    }
    copy
}

fn options(pool: ByteLen, handlers: usize) -> FreezeOptions {
    FreezeOptions::default().with_pool(pool).with_handlers(Handlers::threads(handlers))
}

fn freeze(memory: &Memory, pool: ByteLen, handlers: usize) -> Frozen {
    let options = options(pool, handlers);
    Freezer::prepare(memory.regions(), memory.layout.clone(), &options).unwrap().arm().unwrap()
}

/// One writer for each seed, which touches every page again and again until told to stop; each write is a new value.
fn storm(memory: &Memory, stop: &AtomicBool, seeds: &[u64], sequential: bool, body: impl FnOnce()) {
    std::thread::scope(|scope| {
        let done = Arc::new(AtomicU64::new(0));
        for &seed in seeds {
            let done = Arc::clone(&done);
            scope.spawn(move || {
                let runs: Vec<_> = memory.layout.runs().filter(|run| !run.is_empty()).collect();
                let mut state = seed;
                while !stop.load(Ordering::Acquire) {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let run = runs[usize::try_from(state >> 60).unwrap() % runs.len()];
                    let page = if sequential { (state >> 3) % run.pages.0 } else { (state >> 20) % run.pages.0 };
                    let at = state.to_le_bytes();
                    memory.store(run.block, PageIndex(page), &at);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Also when the body fails: the writers end.
        let _stopping = Stopping(stop);
        body();
    });
}

struct Stopping<'a>(&'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn what_is_delivered_is_what_was_there_at_the_freeze_point() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    let kinds = [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbPrivate, Kind::HugetlbShared];
    for ((number, seed), kind) in seeds(24).zip(kinds.into_iter().cycle()) {
        let huge = matches!(kind, Kind::HugetlbPrivate | Kind::HugetlbShared);
        let oracle = Oracle::random(seed, layout(if huge { &[1024, 512] } else { &[3000, 700] }), 150);
        let memory = Memory::new(kind, oracle.layout());
        let mut stored = populate(&memory, &oracle);
        if huge {
            // A huge page exists as a whole.
            let whole = |run: &PageRun| {
                let first = PageIndex(run.first.0 / 512 * 512);
                PageRun::new(run.block, first, PageCount(run.end().0.next_multiple_of(512)) - PageCount(first.0))
            };
            stored = stored.iter().map(whole).collect();
        }
        let before = copy_of(&memory, &stored);
        let pool = if number % 2 == 0 { ByteLen(8 << 20) } else { ByteLen(1) };
        let frozen = freeze(&memory, pool, 1 + usize::try_from(number % 2).unwrap());
        let handle = frozen.handle();
        let stop = AtomicBool::new(false);
        storm(&memory, &stop, &[seed, seed + (1 << 32)], number % 4 < 2, || {
            let sink = Collector::new(oracle.layout(), None, u64::MAX);
            let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
            assert!(sink.complete());
            let stats = handle.wait().unwrap();
            assert_eq!(stats.pages + stats.zero_pages, oracle.layout().total().to_pages().0, "{kind:?} {stats:?}");
            sink.assert_equals(&before);
            drop(feed);
        });
    }
}

/// Anonymous memory in transparent huge pages, where the kernel has some: they are protected as such and taken apart by
/// writers, one page at a time.
#[test]
fn transparent_huge_pages_are_frozen_exactly() {
    testkit::require!(Userfaultfd);
    let pages = 8 * 512;
    let oracle = Oracle::random(9, layout(&[pages]), 200);
    for (number, seed) in seeds(6) {
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        ask_for_huge_pages(&memory, pages);
        // Every page: the kernel gives huge ones, which hold zeros too.
        for page in (0..pages).map(PageIndex) {
            memory.store(BlockId(0), page, oracle.run(PageRun::single(BlockId(0), page)));
        }
        let before = copy_of(&memory, &[PageRun::new(BlockId(0), PageIndex(0), PageCount(pages))]);
        let pool = if number % 2 == 0 { ByteLen(32 << 20) } else { ByteLen(64 << 12) };
        let frozen = freeze(&memory, pool, 1 + usize::try_from(number % 2).unwrap());
        let handle = frozen.handle();
        let stop = AtomicBool::new(false);
        storm(&memory, &stop, &[seed, seed + (1 << 32)], number % 4 < 2, || {
            let sink = Collector::new(oracle.layout(), None, u64::MAX);
            let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
            assert!(sink.complete());
            handle.wait().unwrap();
            sink.assert_equals(&before);
            drop(feed);
        });
    }
}

#[test]
fn handlers_on_cores_that_do_not_exist_are_refused() {
    testkit::require!(Userfaultfd);
    let oracle = Oracle::random(5, layout(&[8]), 255);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    for core in [1000, 1 << 20] {
        let options = FreezeOptions::default().with_handlers(Handlers::on_cores([0, core]));
        let error = Freezer::prepare(memory.regions(), memory.layout.clone(), &options).unwrap_err();
        assert!(matches!(error, FreezeError::Start(StartError::Core(found)) if found == core), "{error}");
        assert!(error.to_string().contains(&core.to_string()), "{error}");
    }
}

#[test]
fn writers_go_on_while_the_sink_stands_still() {
    testkit::require!(Userfaultfd);
    let oracle = Oracle::random(5, layout(&[512]), 255);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let stored = populate(&memory, &oracle);
    let before = copy_of(&memory, &stored);
    let frozen = freeze(&memory, ByteLen(4 << 20), 1);
    let gate = Gate::closed();
    let sink = Collector::new(oracle.layout(), Some(gate.clone()), u64::MAX);
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    gate.wait_for(1);
    // The pool holds all of memory: no write waits for the sink.
    for page in 0..512 {
        memory.store(BlockId(0), PageIndex(page), &[0xab; PAGE]);
    }
    gate.open();
    assert!(sink.complete());
    sink.assert_equals(&before);
    assert!(memory.load(BlockId(0), PageIndex(17)).iter().all(|&byte| byte == 0xab));
    drop(feed);
}

#[test]
fn a_hole_that_is_written_is_zero_in_the_snapshot() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let memory = Memory::new(kind, &layout(&[4096]));
        memory.store(BlockId(0), PageIndex(7), &[1; PAGE]);
        let stored = [PageRun::single(BlockId(0), PageIndex(7))];
        let before = copy_of(&memory, &stored);
        let frozen = freeze(&memory, ByteLen(1 << 20), 1);
        let handle = frozen.handle();
        for page in (0..4096).step_by(3) {
            memory.store(BlockId(0), PageIndex(page), &[9; 8]);
        }
        let sink = Collector::new(&memory.layout, None, u64::MAX);
        let _feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
        assert!(sink.complete());
        sink.assert_equals(&before);
        let stats = handle.stats();
        assert!(stats.hole_faults >= 1365 && stats.pages == 1, "{kind:?} {stats:?}");
        assert!(memory.load(BlockId(0), PageIndex(9))[..8] == [9; 8]);
    }
}

#[test]
fn two_freezes_in_a_row_and_one_that_is_given_up() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let oracle = Oracle::random(6, layout(&[1500]), 200);
        let memory = Memory::new(kind, oracle.layout());
        populate(&memory, &oracle);
        let stop = AtomicBool::new(false);
        storm(&memory, &stop, &[seed()], false, || {
            // Given up before, in the middle of, and without a delivery: the writer goes on.
            drop(freeze(&memory, ByteLen(1), 1));
            for fail_at in [0, 1, 2] {
                let frozen = freeze(&memory, ByteLen(1 << 16), 1);
                let handle = frozen.handle();
                let sink = Collector::new(oracle.layout(), None, fail_at);
                let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
                assert!(!sink.complete());
                assert!(matches!(handle.wait(), Err(FrozenError::Sink(_))));
                drop(feed);
            }
            let frozen = freeze(&memory, ByteLen(1 << 16), 1);
            frozen.cancel();
            assert!(matches!(frozen.wait(), Err(FrozenError::Cancelled)));
        });
        // Everything exists by now, or may; nobody writes.
        let all: Vec<_> = memory.layout.runs().collect();
        for round in 0..2u8 {
            let before = copy_of(&memory, &all);
            let frozen = freeze(&memory, ByteLen(1 << 20), 1);
            memory.store(BlockId(0), PageIndex(100), &[round; PAGE]);
            let sink = Collector::new(oracle.layout(), None, u64::MAX);
            let _feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
            assert!(sink.complete());
            sink.assert_equals(&before);
        }
    }
}

#[test]
fn memory_that_is_given_back_before_it_is_saved_fails_the_snapshot() {
    testkit::require!(Userfaultfd);
    let oracle = Oracle::random(7, layout(&[64]), 255);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    populate(&memory, &oracle);
    let frozen = freeze(&memory, ByteLen(1 << 20), 1);
    give_back(&memory);
    assert!(matches!(frozen.wait(), Err(FrozenError::Discarded { .. })), "{:?}", frozen.stats());
    assert!(memory.load(BlockId(0), PageIndex(3)).iter().all(|&byte| byte == 0));
}

/// Pages of one piece, each different, frozen with a pool of one buffer, which page 0 has; and what they were.
fn tight(kind: Kind, pauses: impl Fn(PausePoint) + Send + Sync + 'static) -> (Memory, Frozen, Vec<Vec<u8>>) {
    let oracle = Oracle::random(11, layout(&[64]), 255);
    let memory = Memory::new(kind, oracle.layout());
    let stored = populate(&memory, &oracle);
    let before = copy_of(&memory, &stored);
    let options = options(ByteLen(1), 1);
    let freezer = Freezer::prepare(memory.regions(), memory.layout.clone(), &options).unwrap();
    let frozen = freezer.pauses(pauses).arm().unwrap();
    (memory, frozen, before)
}

/// A handler has claimed a page, finds the pool full, and gives its claim back just when the thread that saves has come to
/// that page and found it taken. That thread's buffer still has another page in it.
#[test]
fn a_claim_that_is_given_back_while_the_page_is_gathered() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let (full, waits) = (Gate::closed(), Gate::closed());
        // Page 0 is taken, and then page 5.
        let taken = Gate::open_at_first();
        let gates = (full.clone(), waits.clone(), taken.clone());
        let (memory, frozen, before) = tight(kind, move |point| match point {
            PausePoint::PoolFull => gates.0.enter(),
            PausePoint::WriterWaits => gates.1.enter(),
            PausePoint::NothingGathered => gates.2.enter(),
            _ => {}
        });
        let handle = frozen.handle();
        memory.store(BlockId(0), PageIndex(0), &[0xab; PAGE]);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| memory.store(BlockId(0), PageIndex(5), &[0xcd; PAGE]));
            full.wait_for(1);
            taken.close();
            let sink = Collector::new(&memory.layout, None, u64::MAX);
            let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
            // At page 0, which is saved, and at page 5.
            taken.wait_for(1);
            taken.pass(1);
            while taken.passed() == 0 {
                std::thread::yield_now();
            }
            taken.wait_for(1);
            full.open();
            waits.wait_for(1);
            taken.open();
            waits.open();
            assert!(sink.complete());
            sink.assert_equals(&before);
            writer.join().unwrap();
            drop(feed);
        });
        assert!(memory.load(BlockId(0), PageIndex(5)).iter().all(|&byte| byte == 0xcd));
        assert_eq!(handle.stats().waits_for_pool, 1);
    }
}

/// A handler has copied a page, and the thread that saves comes by before the copy is in the pool: it comes from there.
#[test]
fn a_page_whose_copy_is_under_way_is_not_missed() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let (copied, taken) = (Gate::closed(), Gate::closed());
        let gates = (copied.clone(), taken.clone());
        let (memory, frozen, before) = tight(kind, move |point| match point {
            PausePoint::Copied => gates.0.enter(),
            PausePoint::NothingGathered => gates.1.enter(),
            _ => {}
        });
        let handle = frozen.handle();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| memory.store(BlockId(0), PageIndex(9), &[0xcd; PAGE]));
            copied.wait_for(1);
            let sink = Collector::new(&memory.layout, None, u64::MAX);
            let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
            taken.wait_for(1);
            taken.open();
            // Everything else comes, and that page is waited for.
            while handle.stats().pages + handle.stats().zero_pages < 63 {
                std::thread::yield_now();
            }
            // What must not happen can only be waited for by the clock; what is right does not depend on it.
            let until = Instant::now() + Duration::from_millis(50);
            while Instant::now() < until && !sink.has_ended() {
                std::thread::yield_now();
            }
            let early = sink.has_ended();
            copied.open();
            writer.join().unwrap();
            assert!(!early, "it ended without a page");
            assert!(sink.complete());
            sink.assert_equals(&before);
            drop(feed);
        });
        assert!(memory.load(BlockId(0), PageIndex(9)).iter().all(|&byte| byte == 0xcd));
        assert_eq!(handle.stats().write_faults, 1);
    }
}

#[expect(unsafe_code, reason = "a discard as a VMM does it")]
fn give_back(memory: &Memory) {
    let at = usize::try_from(memory.addr(BlockId(0)).0).unwrap();
    let at = std::ptr::NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap();
    // SAFETY: pages of the test's own mapping, of which nothing is borrowed.
    unsafe { nix::sys::mman::madvise(at, 16 * 4096, nix::sys::mman::MmapAdvise::MADV_DONTNEED) }.unwrap();
}

#[expect(unsafe_code, reason = "asking for huge pages has no safe wrapper")]
fn ask_for_huge_pages(memory: &Memory, pages: u64) {
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(memory.addr(BlockId(0)).0).unwrap());
    // SAFETY: the memory of a test; only what it is made of may change.
    assert_eq!(unsafe { libc::madvise(at, usize::try_from(pages * 4096).unwrap(), libc::MADV_HUGEPAGE) }, 0);
}
