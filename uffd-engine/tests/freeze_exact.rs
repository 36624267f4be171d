//! A snapshot shows exactly the freeze point, or there is none: whatever happens to the memory behind our back, to whatever
//! part of it, at whatever moment. (Memory that is still being loaded: see `freeze_loading`.)

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::behind::{Act, file, happen};
use common::collector::{Collector, layout};
use common::{Kind, Memory, PAGE};
use page_source::{OneShot, PageSink};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::gate::Gate;
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use uffd_engine::{FreezeError, FreezeOptions, Freezer, Frozen, FrozenError, Handlers, Region};

/// When something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    BeforeThePreparation,
    BeforeTheFreezePoint,
    BeforeTheStart,
    WhileItIsSaved,
}

const WHENS: [When; 4] =
    [When::BeforeThePreparation, When::BeforeTheFreezePoint, When::BeforeTheStart, When::WhileItIsSaved];

fn fill(memory: &Memory, oracle: &Oracle) {
    for (run, zero) in memory.layout.runs().flat_map(|run| oracle.kinds(run).collect::<Vec<_>>()) {
        for page in run.iter().filter(|_| !zero) {
            memory.store(run.block, page, oracle.run(PageRun::single(run.block, page)));
        }
    }
}

/// What the memory is, without touching what does not exist: by the page table, and by the file.
fn content(memory: &Memory) -> Vec<Vec<u8>> {
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let blocks = (0..).map(BlockId).zip(memory.layout.blocks());
    let of = |(id, block): (BlockId, &page_units::RamBlock)| {
        let mut bytes = vec![0; block.length().get()];
        for (number, to) in bytes.chunks_mut(PAGE).enumerate() {
            let page = PageIndex(number as u64);
            match file(memory, id) {
                Some(file) => file.read_exact_at(to, page.byte_offset().0).unwrap(),
                None => {
                    let mut entry = [0; 8];
                    let at = (memory.addr(id) + page.byte_offset()).0 / PAGE as u64 * 8;
                    pagemap.read_exact_at(&mut entry, at).unwrap();
                    if entry[7] & 0xc0 != 0 {
                        to.copy_from_slice(&memory.load(id, page));
                    }
                }
            }
        }
        bytes
    };
    blocks.map(of).collect()
}

fn prepare(memory: &Memory) -> Freezer {
    let options = FreezeOptions::default().with_pool(ByteLen(16 << 20)).with_handlers(Handlers::threads(2));
    Freezer::prepare(memory.regions(), memory.layout.clone(), &options).unwrap()
}

/// Delivers it. What comes if everything comes, or why it does not.
fn deliver(frozen: Frozen, memory: &Memory, gate: Option<Gate>) -> (Arc<Collector>, Result<(), FrozenError>) {
    let sink = Collector::new(&memory.layout, gate, u64::MAX);
    let handle = frozen.handle();
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    let complete = sink.complete();
    let end = handle.wait().map(drop);
    assert_eq!(complete, end.is_ok(), "{end:?}");
    drop(feed);
    (sink, end)
}

/// What a test does, for its message.
type Plan = Vec<(When, Act, PageRun)>;

/// Everything that `plan` says happens, and a guest writes to all pages that it can write to after the freeze point.
fn one(kind: Kind, oracle: &Oracle, plan: &Plan) -> Result<(), FrozenError> {
    let memory = Memory::new(kind, oracle.layout());
    fill(&memory, oracle);
    // It writes there.
    let barred = |act: Act, run: PageRun| {
        let bars = |&(_, other, part): &(When, Act, PageRun)| {
            other == Act::ReadOnly && !part.intersect(run).is_empty() || other == Act::Cut && part.block == run.block
        };
        act == Act::FreeLazily && plan.iter().any(bars)
    };
    let happen_now = |now: When| {
        for (when, act, run) in plan {
            if *when == now && !barred(*act, *run) {
                happen(&memory, *run, *act);
            }
        }
    };
    happen_now(When::BeforeThePreparation);
    let freezer = prepare(&memory);
    happen_now(When::BeforeTheFreezePoint);
    let expected = content(&memory);
    let frozen = freezer.arm().unwrap_or_else(|error| panic!("{kind:?}, {plan:?}: {error}"));
    let guest = |pages: u64| {
        for run in memory.layout.runs() {
            for page in run.iter().filter(|page| page.0 % 7 < pages) {
                let barred = |&(_, act, part): &(When, Act, PageRun)| {
                    matches!(act, Act::ReadOnly) && part.block == run.block && part.contains(page)
                        || act == Act::Cut && part.block == run.block && page >= part.first
                };
                if !plan.iter().any(barred) {
                    memory.store(run.block, page, &[0xee; 64]);
                }
            }
        }
    };
    guest(2);
    happen_now(When::BeforeTheStart);
    guest(3);
    let gate = Gate::closed();
    let (sink, end) = std::thread::scope(|scope| {
        let delivery = scope.spawn(|| deliver(frozen, &memory, Some(gate.clone())));
        // The first page is at the sink, or there is none any more.
        while gate.waiting() == 0 && !delivery.is_finished() {
            std::thread::yield_now();
        }
        happen_now(When::WhileItIsSaved);
        guest(5);
        gate.open();
        delivery.join().unwrap()
    });
    if end.is_ok() {
        sink.assert_equals(&expected);
    }
    end
}

/// Acts, at random moments on random parts of random memory. None may be there that is not right; and what leaves the content
/// alone, or comes before the freeze point, is no reason to have none.
#[test]
fn whatever_happens_behind_our_back_a_snapshot_is_exact_or_fails_by_name() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(32).unwrap();
    let acts = [
        Act::FreeLazily,
        Act::GiveBack,
        Act::Punch,
        Act::Allocate,
        Act::Cut,
        Act::Lock,
        Act::Unlock,
        Act::Advise,
        Act::ReadOnly,
        Act::Bind,
        Act::PageOut,
    ];
    let kinds = [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbPrivate, Kind::HugetlbShared];
    let (mut exact, mut failed) = (0, 0);
    for ((number, seed), kind) in seeds(96).zip(kinds.into_iter().cycle()) {
        let mut random = StdRng::seed_from_u64(seed);
        let small = matches!(kind, Kind::Anonymous | Kind::MemfdShared);
        let (granule, pages): (u64, &[u64]) = if small { (1, &[900, 100]) } else { (512, &[2048, 512]) };
        let oracle = Oracle::random(seed, layout(pages), random.random_range(60..=255));
        let plan: Plan = (0..random.random_range(1..=3))
            .map(|turn| {
                let block = BlockId(random.random_range(0..2));
                let granules = pages[block.0 as usize] / granule;
                let first = random.random_range(0..granules);
                let count = random.random_range(1..=(granules - first).min(300));
                let run = PageRun::new(block, PageIndex(first * granule), PageCount(count * granule));
                let act = match turn {
                    0 => acts[usize::try_from(number / 4).unwrap() % acts.len()],
                    _ => acts[random.random_range(0..acts.len())],
                };
                let mut when = WHENS[random.random_range(0..4)];
                // Memory that is too short before it is frozen is its owner's mistake.
                if act == Act::Cut && matches!(when, When::BeforeThePreparation | When::BeforeTheFreezePoint) {
                    when = When::BeforeTheStart;
                }
                (when, act, run)
            })
            .collect();
        eprintln!("{kind:?} {plan:?}");
        let harmless = |&(when, act, _): &(When, Act, PageRun)| {
            let changes = matches!(act, Act::FreeLazily | Act::GiveBack | Act::Punch | Act::Allocate | Act::Cut);
            !changes || matches!(when, When::BeforeThePreparation | When::BeforeTheFreezePoint)
        };
        match one(kind, &oracle, &plan) {
            Ok(()) => exact += 1,
            Err(error) => {
                failed += 1;
                let named = matches!(
                    error,
                    FrozenError::Discarded { .. } | FrozenError::FileChanged { .. } | FrozenError::Kernel { .. }
                );
                assert!(named && !plan.iter().all(harmless), "{kind:?}, {plan:?}: {error}");
            }
        }
    }
    assert!(exact > 20 && failed > 5, "{exact} are exact, {failed} failed: one of them is hardly tried");
}

/// Each of these must end the snapshot, and not only may.
#[test]
fn pages_that_are_lost_before_they_are_saved_end_the_snapshot() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(16).unwrap();
    for kind in [Kind::MemfdShared, Kind::HugetlbShared] {
        let granule = if kind == Kind::MemfdShared { 1 } else { 512 };
        let oracle = Oracle::random(3, layout(&[8 * granule]), 255);
        let part = PageRun::new(BlockId(0), PageIndex(6 * granule), PageCount(granule));
        for touched in [false, true] {
            let memory = Memory::new(kind, oracle.layout());
            fill(&memory, &oracle);
            let frozen = prepare(&memory).arm().unwrap();
            assert!(happen(&memory, part, Act::Punch));
            if touched {
                memory.store(part.block, part.first, &[1]);
            }
            let (_, end) = deliver(frozen, &memory, None);
            let error = end.unwrap_err();
            let named = matches!(error, FrozenError::Discarded { .. } | FrozenError::FileChanged { .. });
            assert!(named, "{kind:?}, touched: {touched}: {error}");
        }
    }
}

/// Somebody else writes to holes of the file before they were looked up: they would pass for content of the freeze point.
#[test]
fn pages_that_somebody_else_makes_before_they_are_looked_up_end_the_snapshot() {
    testkit::require!(Userfaultfd);
    let memory = Memory::new(Kind::MemfdShared, &layout(&[1024]));
    memory.store(BlockId(0), PageIndex(7), &[1; PAGE]);
    let frozen = prepare(&memory).arm().unwrap();
    // Our own writers make pages too.
    memory.store(BlockId(0), PageIndex(9), &[1; PAGE]);
    let elsewhere = PageRun::single(BlockId(0), PageIndex(100));
    assert!(happen(&memory, elsewhere, Act::WriteToFile));
    let (_, end) = deliver(frozen, &memory, None);
    let error = end.unwrap_err();
    assert!(
        matches!(error, FrozenError::FileChanged { expected, found, .. } if expected == PageCount(2) && found == PageCount(3)),
        "{error}"
    );
}

/// Pages that were allocated before the freeze point, and written to after it: next to others and far from any.
#[test]
fn pages_that_were_only_allocated_are_zero_in_the_snapshot() {
    testkit::require!(Userfaultfd);
    let memory = Memory::new(Kind::MemfdShared, &layout(&[2048]));
    for first in [0, 1500] {
        assert!(happen(&memory, PageRun::new(BlockId(0), PageIndex(first), PageCount(100)), Act::Allocate));
    }
    memory.store(BlockId(0), PageIndex(7), &[1; PAGE]);
    let expected = content(&memory);
    let frozen = prepare(&memory).arm().unwrap();
    for page in [8, 600, 1501, 1599] {
        memory.store(BlockId(0), PageIndex(page), &[2; PAGE]);
    }
    let (sink, end) = deliver(frozen, &memory, None);
    end.unwrap();
    sink.assert_equals(&expected);
}

/// A file that holds other things too is not counted: what happens to them does not matter.
#[test]
fn a_file_that_is_longer_than_the_memory_may_change_elsewhere() {
    testkit::require!(Userfaultfd);
    let memory = Memory::new(Kind::MemfdShared, &layout(&[64]));
    let file = file(&memory, BlockId(0)).unwrap();
    file.set_len(128 * PAGE as u64).unwrap();
    memory.store(BlockId(0), PageIndex(7), &[1; PAGE]);
    let expected = content(&memory);
    let frozen = prepare(&memory).arm().unwrap();
    file.write_all_at(&[1; PAGE], 100 * PAGE as u64).unwrap();
    let (sink, end) = deliver(frozen, &memory, None);
    end.unwrap();
    sink.assert_equals(&expected);
}

#[test]
fn memory_that_can_not_be_frozen_exactly_is_refused_by_name() {
    testkit::require!(Userfaultfd);
    let layout = layout(&[64]);
    let refused = |regions: Vec<Region>| {
        Freezer::prepare(regions, layout.clone(), &FreezeOptions::default()).unwrap_err().to_string()
    };
    let private = Memory::new(Kind::MemfdPrivate, &layout);
    assert!(refused(private.regions()).contains("a private mapping of a file"));
    let shared = Memory::new(Kind::MemfdShared, &layout);
    let without = shared.regions_without_file().remove(0);
    assert!(refused(vec![without]).contains("with_file"));
}

/// Settings of the kernel's merging, put back at the end.
struct Merging([(&'static str, String); 3]);

const KSM: &str = "/sys/kernel/mm/ksm";

impl Merging {
    fn fast() -> Merging {
        let saved = ["run", "pages_to_scan", "sleep_millisecs"].map(|name| {
            let value = std::fs::read_to_string(format!("{KSM}/{name}")).unwrap();
            (name, value.trim().to_owned())
        });
        set("pages_to_scan", "100000");
        set("sleep_millisecs", "0");
        set("run", "1");
        Merging(saved)
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        self.0.iter().for_each(|(name, value)| set(name, value));
    }
}

fn set(name: &str, value: &str) {
    std::fs::write(format!("{KSM}/{name}"), value).unwrap();
}

fn number(path: &str) -> u64 {
    std::fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// Waits until the kernel has gone through all mergeable memory.
fn until_scanned() {
    let scans = || number(&format!("{KSM}/full_scans"));
    let (goal, begun) = (scans() + 3, Instant::now());
    while scans() < goal {
        assert!(begun.elapsed() < Duration::from_secs(60), "ksmd does not scan");
        std::thread::yield_now();
    }
}

fn advise(memory: &Memory, advice: i32) {
    let at = std::ptr::with_exposed_provenance_mut(usize::try_from(memory.addr(BlockId(0)).0).unwrap());
    #[expect(unsafe_code, reason = "merging has no safe wrapper")]
    // SAFETY: the test's own mapping; its content stays as it is.
    let done = unsafe { libc::madvise(at, memory.layout.total().get(), advice) };
    assert_eq!(done, 0);
}

/// `PR_SET_MEMORY_MERGE`.
fn merge_everything(on: bool) -> bool {
    #[expect(unsafe_code, reason = "prctl has no safe wrapper")]
    // SAFETY: the content of memory stays as it is.
    unsafe {
        libc::prctl(67, libc::c_ulong::from(on), 0, 0, 0) == 0
    }
}

/// Equal pages that the kernel merges lose their write protection.
#[test]
fn equal_pages_are_not_merged_while_they_are_frozen() {
    testkit::require!(Userfaultfd, Root);
    if !std::path::Path::new(KSM).exists() {
        testkit::require::without("KSM", "this kernel has none");
        return;
    }
    let pages = 512;
    let of_two = |page: u64| [u8::try_from(page / 2 % 251).unwrap() + 1; PAGE];
    for everything in [false, true] {
        let memory = Memory::new(Kind::Anonymous, &layout(&[pages]));
        // To see that something is merged at all.
        let bait = Memory::new(Kind::Anonymous, &layout(&[pages]));
        if everything && !merge_everything(true) {
            // Before Linux 6.4.
            break;
        }
        for page in 0..pages {
            memory.store(BlockId(0), PageIndex(page), &of_two(page));
            bait.store(BlockId(0), PageIndex(page), &[0x55; PAGE]);
        }
        advise(&bait, libc::MADV_MERGEABLE);
        if !everything {
            advise(&memory, libc::MADV_MERGEABLE);
        }
        let expected = content(&memory);
        let frozen = prepare(&memory).arm().unwrap();
        let merging = Merging::fast();
        until_scanned();
        assert!(number("/proc/self/ksm_merging_pages") > 0, "nothing is merged: the test shows nothing");
        for page in 0..pages {
            memory.store(BlockId(0), PageIndex(page), &[0xee; PAGE]);
        }
        drop(merging);
        assert_eq!(frozen.stats().write_faults, pages, "each write is seen");
        let (sink, end) = deliver(frozen, &memory, None);
        end.unwrap();
        sink.assert_equals(&expected);
        if everything {
            assert!(smaps_flags(&memory).contains(" mg"), "the rule of the process holds again");
            assert!(merge_everything(false));
        }
    }
}

fn smaps_flags(memory: &Memory) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = memory.addr(BlockId(0)).0;
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((from, to)) = line.split_once(' ').and_then(|(range, _)| range.split_once('-'))
            && let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
        {
            inside = (from..to).contains(&start);
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return format!("{flags} ");
        }
    }
    panic!("the mapping is not there")
}

/// Reading memory is an error where it can't be read, and never the death of the process.
#[test]
fn memory_that_is_cut_off_ends_the_snapshot_and_not_the_process() {
    testkit::require!(Userfaultfd);
    let oracle = Oracle::random(5, layout(&[64]), 255);
    let memory = Memory::new(Kind::MemfdShared, oracle.layout());
    fill(&memory, &oracle);
    let frozen = prepare(&memory).arm().unwrap();
    assert!(happen(&memory, PageRun::new(BlockId(0), PageIndex(32), PageCount(32)), Act::Cut));
    let (_, end) = deliver(frozen, &memory, None);
    let error = end.unwrap_err();
    assert!(matches!(error, FrozenError::Kernel { .. } | FrozenError::FileChanged { .. }), "{error}");
}

#[test]
fn a_second_freeze_of_the_same_memory_is_refused() {
    testkit::require!(Userfaultfd);
    let memory = Memory::new(Kind::Anonymous, &layout(&[64]));
    let frozen = prepare(&memory).arm().unwrap();
    let error = prepare(&memory).arm().unwrap_err();
    assert!(matches!(error, FreezeError::Arm { .. } | FreezeError::Busy), "{error}");
    drop(frozen);
    drop(prepare(&memory).arm().unwrap());
}
