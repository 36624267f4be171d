//! The only handler of an engine that reads events waits inside the gate when nobody else installs. An installer
//! gets in at every moment.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::blocked::Thread;
use common::discards::{Way, discard, give_back};
use common::refused::right_or_refused;
use common::scripted::full;
use common::{Kind, Memory};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use testkit::gate::Gate;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Engine, EngineError, PausePoint};

/// What never happens is waited for no longer than this.
const NEVER: Duration = Duration::from_secs(20);
/// After how many undisturbed faults a handler parks inside the gate.
const PEACE: u64 = 8;
const PAGES: u64 = 256;

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
}

struct Served {
    oracle: Arc<Oracle>,
    memory: Memory,
    engine: Engine,
}

/// An engine whose background is paused, with a handler that comes to a gate when it is inside, about to wait.
fn serve(kind: Kind, inside: &Gate) -> Served {
    let oracle = full(PAGES);
    let memory = Memory::new(kind, oracle.layout());
    let at_gate = inside.clone();
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .background(Background::default().paused().with_piece(PageCount(4)))
        .pauses(move |point| {
            if point == PausePoint::WaitsInside {
                at_gate.enter();
            }
        })
        .start()
        .unwrap();
    let served = Served { oracle, memory, engine };
    served.touch(0..PEACE);
    served
}

impl Served {
    fn touch(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            assert!(self.memory.load(BlockId(0), PageIndex(page)) == self.oracle.run(run(page, 1)), "page {page}");
        }
    }

    /// Loads everything, and compares it; some pages read as zero.
    fn finish(self, zeros: std::ops::Range<u64>) {
        self.engine.resume_background();
        let ended = self.engine.wait_for(NEVER);
        assert!(matches!(ended, Some(Ok(_))), "{ended:?}");
        self.touch(0..zeros.start);
        self.touch(zeros.end..PAGES);
        for page in zeros {
            assert!(self.memory.load(BlockId(0), PageIndex(page)).iter().all(|&byte| byte == 0), "page {page}");
        }
    }
}

/// Nothing wakes the handler but an installer that wants in.
#[test]
fn the_loader_gets_past_a_handler_that_waits_inside() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        let inside = Gate::open_at_first();
        let served = serve(kind, &inside);
        inside.wait_for_passed(1);
        served.finish(0..0);
    }
}

/// An interrupt comes before the handler waits, which reads it when it does; or a fault comes as well, and it reads both.
#[test]
fn a_knock_before_the_handler_waits() {
    testkit::require!(Userfaultfd);
    for fault_too in [false, true] {
        let inside = Gate::closed();
        let served = serve(Kind::Anonymous, &inside);
        std::thread::scope(|scope| {
            inside.wait_for(1);
            let touching = fault_too.then(|| {
                let touching = Thread::spawn(scope, || served.touch(20..21));
                touching.wait_for_fault();
                touching
            });
            let knocking = Thread::spawn(scope, || served.engine.discard(run(30, 2)).unwrap());
            knocking.wait_for_fault();
            inside.open();
            knocking.join();
            if let Some(touching) = touching {
                touching.join();
            }
        });
        served.finish(30..32);
    }
}

/// Two want in at once: one interrupt is enough for both.
#[test]
fn two_interrupts_at_once_let_both_in() {
    testkit::require!(Userfaultfd);
    let inside = Gate::closed();
    let served = serve(Kind::Anonymous, &inside);
    std::thread::scope(|scope| {
        inside.wait_for(1);
        let knocking = [30, 31].map(|page| {
            let engine = &served.engine;
            let knocking = Thread::spawn(scope, move || engine.discard(run(page, 1)).unwrap());
            knocking.wait_for_fault();
            knocking
        });
        inside.open();
        knocking.into_iter().for_each(Thread::join);
    });
    served.finish(30..32);
}

/// The event of a discard is what the handler waits for.
#[test]
fn a_discard_that_is_read_inside() {
    testkit::require!(Userfaultfd);
    for before in [false, true] {
        let inside = if before { Gate::closed() } else { Gate::open_at_first() };
        let served = serve(Kind::Anonymous, &inside);
        std::thread::scope(|scope| {
            if before {
                inside.wait_for(1);
            } else {
                inside.wait_for_passed(1);
            }
            // One page that is there, and one that is missing.
            let discarding = Thread::spawn(scope, || give_back(&served.memory, run(PEACE - 1, 2)));
            if before {
                discarding.wait_for_discard();
                inside.open();
            }
            discarding.join();
        });
        served.finish(PEACE - 1..PEACE + 1);
    }
}

#[test]
fn an_engine_is_cancelled_or_dropped_while_its_handler_is_inside() {
    testkit::require!(Userfaultfd);
    for cancel in [true, false] {
        let inside = Gate::open_at_first();
        let served = serve(Kind::Anonymous, &inside);
        inside.wait_for_passed(1);
        if cancel {
            served.engine.cancel();
            assert!(matches!(served.engine.outcome(), Some(Err(EngineError::Cancelled))));
        }
        drop(served.engine);
        assert_eq!(right_or_refused(&served.memory, &served.oracle), PAGES - PEACE);
    }
}

/// The handler is disturbed again and again, by loads and discards of every kind, while memory is read and written.
#[test]
fn a_handler_that_is_disturbed_all_the_time() {
    testkit::require!(Userfaultfd);
    for round in 0..20 {
        let inside = Gate::open_at_first();
        let served = serve(if round % 2 == 0 { Kind::Anonymous } else { Kind::MemfdShared }, &inside);
        std::thread::scope(|scope| {
            let served = &served;
            for (half, way) in [(0, Way::Kernel), (1, Way::Engine)] {
                scope.spawn(move || {
                    for turn in 0..200 {
                        let page = half * 64 + 32 + turn * 37 % 64;
                        discard(way, &served.engine, &served.memory, run(page, 1));
                        let read = served.memory.load(BlockId(0), PageIndex(page));
                        assert!(read.iter().all(|&byte| byte == 0), "page {page} in turn {turn}");
                    }
                });
            }
            scope.spawn(|| {
                for page in 160..PAGES {
                    served.touch(page..page + 1);
                    if page % 16 == 0 {
                        served.engine.resume_background();
                    } else if page % 16 == 1 {
                        served.engine.pause_background();
                    }
                }
            });
        });
        assert!(inside.passed() > 0);
        served.finish(32..160);
    }
}
