//! Sources that push by themselves: at once, in parts, twice, and to their end.

mod common;

use std::sync::Arc;
use std::thread::Builder as Thread;

use common::scripted::{Scripted, full};
use common::{HUGE_KINDS, Kind, Memory, PAGE, SMALL_KINDS};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use testkit::gate::Gate;
use testkit::hugepages::Overcommit;
use uffd_engine::{Background, Discards, EngineError, PausePoint, StartError};

const HUGE: u64 = 512;

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
}

#[test]
fn a_source_that_delivers_everything_while_it_is_started() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(2).unwrap();
    for kind in SMALL_KINDS.into_iter().chain(HUGE_KINDS) {
        for discards in [Discards::Events, Discards::Announced] {
            let oracle = full(2 * HUGE);
            let memory = Memory::new(kind, oracle.layout());
            let source = Scripted::new(Arc::clone(&oracle)).pushing_at_start();
            let engine = memory.engine(Box::new(source)).discards(discards).start().unwrap();
            let stats = engine.wait().unwrap().stats;
            assert_eq!((stats.background_pages, stats.demand_faults), (2 * HUGE, 0), "{kind:?} {stats:?}");
            memory.assert_equals(&oracle);
        }
    }
}

#[test]
fn a_source_that_can_not_be_started_leaves_ordinary_memory() {
    testkit::require!(Userfaultfd);
    let oracle = full(8);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let source = Arc::new(Scripted::new(Arc::clone(&oracle)).failing_at_start());
    let before = common::fd_count();
    for _ in 0..200 {
        let started = memory.engine(source.peer()).start();
        assert!(matches!(started, Err(StartError::Source(_))), "{started:?}");
    }
    assert!(common::fd_count() < before + 150, "descriptors stay open");
    assert_eq!(memory.load(BlockId(0), PageIndex(3)), vec![0; PAGE]);
}

/// A piece has been found to be needed, and the rest comes and the guest writes to the page before it is put there: it is
/// not put there any more.
#[test]
fn a_piece_that_comes_too_late_changes_nothing() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(1).unwrap();
    for kind in HUGE_KINDS {
        let oracle = full(HUGE);
        let memory = Memory::new(kind, oracle.layout());
        let source = Arc::new(Scripted::new(Arc::clone(&oracle)));
        let gate = Gate::closed();
        let at_gate = gate.clone();
        let engine = memory
            .engine(source.peer())
            .background(Background::default().paused())
            .pauses(move |point| {
                if point == PausePoint::Piece && std::thread::current().name() == Some("late") {
                    at_gate.enter();
                }
            })
            .start()
            .unwrap();
        let written = vec![0x5a; PAGE];
        std::thread::scope(|scope| {
            let late = Thread::new().name("late".into()).spawn_scoped(scope, || source.push(run(0, 256)));
            gate.wait_for(1);
            assert!(source.push(run(0, 256)).is_taken());
            assert!(source.push(run(256, 256)).is_taken());
            memory.store(BlockId(0), PageIndex(3), &written);
            gate.open();
            assert!(late.unwrap().join().unwrap().is_taken());
        });
        assert!(memory.load(BlockId(0), PageIndex(3)) == written, "{kind:?}: the guest's own bytes are overwritten");
        let stats = engine.stats();
        assert_eq!((stats.background_pages, stats.duplicates), (HUGE, HUGE), "{kind:?} {stats:?}");
        // It left nothing behind that would count as an incomplete page.
        for _ in 0..100 {
            assert!(source.push(run(0, 100)).is_taken());
        }
        engine.resume_background();
        engine.wait().unwrap();
    }
}

/// Pieces of one huge page from several threads at once, each page from two of them.
#[test]
fn pieces_of_one_page_from_many_threads() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(2).unwrap();
    for kind in HUGE_KINDS {
        for _ in 0..10 {
            let oracle = full(2 * HUGE);
            let memory = Memory::new(kind, oracle.layout());
            let source = Arc::new(Scripted::new(Arc::clone(&oracle)));
            let engine = memory.engine(source.peer()).start().unwrap();
            std::thread::scope(|scope| {
                for thread in 0..4u64 {
                    let (source, engine) = (&source, &engine);
                    scope.spawn(move || {
                        for at in 0..64 {
                            let piece = (at * 5 + thread / 2) % 64 * 16;
                            // Nothing more is taken when the others have brought everything.
                            assert!(source.push(run(piece, 16)).is_taken() || engine.wait().is_ok());
                        }
                    });
                }
                scope.spawn(|| assert!(memory.load(BlockId(0), PageIndex(700)) == oracle.run(run(700, 1))));
            });
            engine.wait().unwrap();
            memory.assert_equals(&oracle);
        }
    }
}

/// The end says that what never came is zero: in a huge page that came in part, that is the rest of it.
#[test]
fn the_end_makes_zero_of_what_never_came_and_of_nothing_else() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(3).unwrap();
    for kind in SMALL_KINDS.into_iter().chain(HUGE_KINDS) {
        let oracle = full(3 * HUGE);
        let memory = Memory::new(kind, oracle.layout());
        let source = Arc::new(Scripted::new(Arc::clone(&oracle)));
        let engine = memory.engine(source.peer()).start().unwrap();
        let came = [run(0, HUGE), run(HUGE + 7, 100), run(HUGE + 300, 1)];
        std::thread::scope(|scope| {
            // Somebody waits for a page that came, of a huge page that is not whole.
            let waiting = scope.spawn(|| memory.load(BlockId(0), PageIndex(HUGE + 8)));
            for piece in came {
                assert!(source.push(piece).is_taken());
            }
            source.end();
            assert!(waiting.join().unwrap() == oracle.run(run(HUGE + 8, 1)), "{kind:?}");
        });
        engine.wait().unwrap();
        for page in 0..3 * HUGE {
            let came = came.iter().any(|run| run.iter().any(|one| one.0 == page));
            let right = if came { oracle.run(run(page, 1)).to_vec() } else { vec![0; PAGE] };
            assert!(memory.load(BlockId(0), PageIndex(page)) == right, "{kind:?} page {page}");
        }
    }
}

/// The first half of each huge page comes first: as many are incomplete as were asked for at a time.
#[test]
fn all_that_was_asked_for_may_be_incomplete_at_a_time() {
    testkit::require!(Userfaultfd, Hugepages);
    const PAGES: u64 = 20;
    let _pages = Overcommit::reserve(PAGES).unwrap();
    let oracle = full(PAGES * HUGE);
    let memory = Memory::new(Kind::HugetlbPrivate, oracle.layout());
    let source = Arc::new(Scripted::new(Arc::clone(&oracle)));
    let engine = memory.engine(source.peer()).start().unwrap();
    let wait_for = |count: usize| {
        while source.asked().len() < count {
            assert!(engine.outcome().is_none(), "{:?}", engine.outcome());
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        // The window of the background is full, and then there are faults.
        wait_for(16);
        let memory = &memory;
        let oracle = &oracle;
        for huge in 16..PAGES {
            let page = PageIndex(huge * HUGE + 300);
            scope.spawn(move || {
                let got = memory.read(BlockId(0), page);
                assert!(got.unwrap() == oracle.run(PageRun::single(BlockId(0), page)));
            });
        }
        wait_for(20);
        for half in [0, 256] {
            for asked in source.asked() {
                assert_eq!(asked.pages, PageCount(HUGE));
                assert!(source.push(run(asked.first.0 + half, 256)).is_taken(), "{:?}", engine.outcome());
            }
        }
    });
    engine.wait().unwrap();
    memory.assert_equals(&oracle);
}

/// The limit is kept whatever a source does, and the error says what was too much.
#[test]
fn more_incomplete_huge_pages_than_were_allowed_fail() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(1).unwrap();
    for (asked, limit) in [(1, 17), (20, 20)] {
        let oracle = full((limit + 2) * HUGE);
        let memory = Memory::new(Kind::HugetlbPrivate, oracle.layout());
        let source = Arc::new(Scripted::new(Arc::clone(&oracle)));
        let background = Background::off().with_window(PageCount(1));
        let builder = memory.engine(source.peer()).background(background);
        let engine = builder.incomplete_huge_pages(asked).start().unwrap();
        for huge in 0..limit {
            assert!(source.push(run(huge * HUGE + huge, 1)).is_taken(), "{huge}: {:?}", engine.outcome());
        }
        assert!(engine.outcome().is_none());
        assert!(!source.push(run(limit * HUGE + 5, 1)).is_taken());
        let error = engine.wait().unwrap_err();
        assert!(matches!(&error, EngineError::Staging { block, .. } if &**block == "ram"), "{error}");
        let page = limit * HUGE + 5;
        for part in [format!("pages {page}..{} of RAM block \"ram\"", page + 1), format!("more than {limit} huge")] {
            assert!(error.to_string().contains(&part), "{error}");
        }
        // None of it became memory: not what came in part, and not what never came.
        for page in [0, HUGE + 1, page] {
            assert!(memory.read(BlockId(0), PageIndex(page)).is_err(), "page {page}");
        }
    }
}

/// The memory is gone: the kernel takes nothing, and the error names the block.
#[test]
fn an_install_that_the_kernel_refuses_names_the_block() {
    testkit::require!(Userfaultfd);
    let oracle = full(8);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let source = Arc::new(Scripted::new(Arc::clone(&oracle)));
    let builder = memory.engine(source.peer()).background(Background::off());
    let engine = builder.discards(Discards::Announced).start().unwrap();
    drop(memory);
    assert!(!source.push(run(3, 2)).is_taken());
    let error = engine.wait().unwrap_err();
    assert!(matches!(&error, EngineError::Install { block, .. } if &**block == "ram"), "{error}");
    // Page by page in the end: a region may be many mappings.
    assert!(error.to_string().contains("pages 3..4 of RAM block \"ram\" at 0x"), "{error}");
}
