//! Threads of an engine that die, and observers that do what they should not: the engine ends all the same, and every
//! waiter is answered.

mod common;

use std::panic::panic_any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use common::blocked::Thread;
use common::discards::give_back;
use common::refused::{right_or_refused, right_or_refused_or_zero};
use common::scripted::full;
use common::{Kind, Memory};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use parking_lot::Mutex;
use testkit::faults::{Fault, FaultySource};
use testkit::gate::Gate;
use testkit::source::MemorySource;
use uffd_engine::{Background, Discards, Engine, EngineError, Event, Handlers, PausePoint, Wait};

fn touch_until_refused(memory: &Memory) {
    let run = memory.layout.runs().next().unwrap();
    assert!(run.iter().any(|page| memory.read(run.block, page).is_err()), "nothing was refused");
}

#[test]
fn a_handler_that_dies_at_any_point_fails_the_engine() {
    testkit::require!(Userfaultfd);
    let waits = [(Wait::Block, Discards::Events), (Wait::Block, Discards::Announced), (Wait::Spin, Discards::Events)];
    let points = [PausePoint::FaultRead, PausePoint::Claimed, PausePoint::Installed].map(|point| (point, &waits[..]));
    for (point, waits) in points.into_iter().chain([(PausePoint::WaitsInside, &waits[..1])]) {
        for &(wait, discards) in waits {
            let oracle = full(256);
            let memory = Memory::new(Kind::Anonymous, oracle.layout());
            let engine = memory
                .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
                .handlers(Handlers::threads(1).waiting(wait))
                .discards(discards)
                .background(Background::off())
                .pauses(move |at| {
                    if at == point {
                        panic_any("injected");
                    }
                })
                .start()
                .unwrap();
            touch_until_refused(&memory);
            assert!(matches!(engine.wait(), Err(EngineError::ThreadDied(_))));
            drop(engine);
            right_or_refused(&memory, &oracle);
        }
    }
}

/// The last handler dies while somebody gives memory back: nobody reads that event any more, and while it is unread the
/// kernel poisons nothing.
#[test]
fn a_handler_that_dies_with_a_discard_unread_fails_the_engine() {
    testkit::require!(Userfaultfd);
    // After some faults in peace a handler that blocks does so in its read.
    for (wait, before) in [(Wait::Block, 0), (Wait::Block, 20), (Wait::Spin, 0)] {
        let oracle = full(64);
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let gate = Gate::closed();
        let at_gate = gate.clone();
        let faults = AtomicU64::new(0);
        let engine = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .handlers(Handlers::threads(1).waiting(wait))
            .background(Background::off())
            .pauses(move |at| {
                if at == PausePoint::FaultRead && faults.fetch_add(1, Ordering::Relaxed) == before {
                    at_gate.enter();
                    panic_any("injected");
                }
            })
            .start()
            .unwrap();
        for page in 0..before {
            assert!(memory.read(BlockId(0), PageIndex(20 + page)).is_ok());
        }
        std::thread::scope(|scope| {
            let touching = Thread::spawn(scope, || memory.read(BlockId(0), PageIndex(9)));
            gate.wait_for(1);
            let discards = [3, 5].map(|page| {
                let one = PageRun::single(BlockId(0), PageIndex(page));
                let memory = &memory;
                Thread::spawn(scope, move || give_back(memory, one))
            });
            discards.iter().for_each(Thread::wait_for_discard);
            gate.open();
            let ended = engine.wait_for(Duration::from_secs(20));
            assert!(matches!(ended, Some(Err(EngineError::ThreadDied(_)))), "{ended:?}");
            assert!(touching.join().is_err());
            // Before the engine is dropped: its descriptor is still open.
            discards.into_iter().for_each(Thread::join);
        });
        drop(engine);
        assert!(right_or_refused_or_zero(&memory, &oracle, &[PageIndex(3), PageIndex(5)]) > 0);
    }
}

#[test]
fn a_loader_that_dies_fails_the_engine() {
    testkit::require!(Userfaultfd);
    let oracle = full(4096);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), 5, Fault::Panic);
    let engine = memory.engine(Arc::new(source)).start().unwrap();
    assert!(matches!(engine.wait(), Err(EngineError::ThreadDied(_))));
    assert!(right_or_refused(&memory, &oracle) > 0);
}

/// An observer is called on the thread that ends the engine: it can't wait for that, and must not hang there.
#[test]
fn an_observer_that_waits_for_its_own_engine() {
    testkit::require!(Userfaultfd);
    #[derive(Clone, Copy, Debug)]
    enum Does {
        Wait,
        WaitFor,
        Cancel,
        Drop,
    }
    for does in [Does::Wait, Does::WaitFor, Does::Cancel, Does::Drop] {
        let oracle = full(64);
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let engine: Arc<Mutex<Option<Engine>>> = Arc::default();
        let (tell, heard) = mpsc::channel();
        let its = Arc::clone(&engine);
        let started = memory
            .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
            .background(Background::default().paused())
            .observer(move |event| {
                if let Event::FirstFault { .. } = event {
                    let mut its = its.lock();
                    let engine = its.as_ref().unwrap();
                    match does {
                        Does::Wait => assert!(matches!(engine.wait(), Err(EngineError::OnObserver))),
                        Does::WaitFor => assert!(engine.wait_for(Duration::from_secs(3600)).is_none()),
                        Does::Cancel => engine.cancel(),
                        Does::Drop => drop(its.take()),
                    }
                }
                tell.send(event.clone()).unwrap();
            })
            .start()
            .unwrap();
        *engine.lock() = Some(started);
        let touched = memory.read(BlockId(0), PageIndex(3));
        let next = || heard.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(next(), Event::FirstFault { .. }), "{does:?}");
        match does {
            Does::Wait | Does::WaitFor => {
                assert!(touched.is_ok(), "{does:?}");
                engine.lock().as_ref().unwrap().resume_background();
                assert!(matches!(next(), Event::RegionComplete { .. }), "{does:?}");
                assert!(matches!(next(), Event::Complete { .. }), "{does:?}");
                assert_eq!(right_or_refused(&memory, &oracle), 0);
            }
            Does::Cancel | Does::Drop => {
                assert!(matches!(next(), Event::Failed(EngineError::Cancelled)), "{does:?}");
                // It may have been given up before that fault was served.
                let touched = u64::from(touched.is_err());
                assert_eq!(right_or_refused(&memory, &oracle), 63 + touched, "{does:?}");
            }
        }
        drop(engine.lock().take());
    }
}

#[test]
fn an_observer_that_panics_changes_nothing_else() {
    testkit::require!(Userfaultfd);
    for fault_at in [3, u64::MAX] {
        let oracle = full(512);
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let source = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), fault_at, Fault::Error);
        let background = Background::default().with_piece(PageCount(16));
        let engine =
            memory.engine(Arc::new(source)).background(background).observer(|_| panic_any("injected")).start().unwrap();
        assert_eq!(engine.wait().is_ok(), fault_at == u64::MAX);
        drop(engine);
        right_or_refused(&memory, &oracle);
    }
}
