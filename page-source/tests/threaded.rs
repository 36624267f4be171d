//! Answers from threads of one's own: demand first, and silence after the drop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use page_source::{Answer, End, PageSource, Reply, SinkError, Threaded, Urgency};
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use testkit::collector::Collector;
use testkit::faults::{Altered, Fault, FaultySource};
use testkit::gate::Gate;
use testkit::late::LateSource;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use testkit::source::MemorySource;

fn oracle() -> Arc<Oracle> {
    let bytes = (0..1024 * 4096).map(|i| u8::try_from(i / 4096 % 255).unwrap() + 1).collect();
    Arc::new(Oracle::new([("ram", bytes)]).unwrap())
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BlockId(0), PageIndex(first), PageCount(pages))
}

#[test]
fn demand_overtakes_the_background() {
    let source = Threaded::new(MemorySource::new(oracle()), 1);
    let (background, demand) = (Gate::closed(), Gate::closed());
    let (first_piece, urgent) = (background.clone(), demand.clone());
    let sink = Collector::with_hook(move |run| {
        match run.first.0 {
            0 => first_piece.enter(),
            700 => urgent.enter(),
            _ => {}
        }
        Reply::Taken
    });
    let arrived = |runs: usize| {
        while sink.state.lock().runs.len() < runs {
            std::thread::yield_now();
        }
    };
    let feed = source.start(sink.clone()).unwrap();
    feed.request(run(0, 256), Urgency::Background);
    background.wait_for(1);
    // The background stands still; demand does not.
    feed.request(run(600, 1), Urgency::Demand);
    arrived(1);
    // Now the demand thread stands still, too. The background thread goes on with what is in demand.
    feed.request(run(700, 1), Urgency::Demand);
    demand.wait_for(1);
    feed.request(run(800, 1), Urgency::Demand);
    background.open();
    arrived(6);
    demand.open();
    arrived(7);
    drop(feed);
    let order: Vec<_> = sink.state.lock().runs.iter().map(|(run, _)| run.first.0).collect();
    assert_eq!(order, [600, 0, 800, 64, 128, 192, 700]);
}

#[test]
fn no_call_follows_the_drop_in_any_state() {
    let oracle = oracle();
    for (number, seed) in seeds(40) {
        let gate = Gate::open_at_first();
        let late = LateSource::new(Arc::clone(&oracle), seed).with_threads(2).with_gate(gate.clone());
        let memory = MemorySource::new(Arc::clone(&oracle));
        let slow = FaultySource::new(Arc::new(memory.clone()), 3, Fault::Slow(gate.clone()));
        let sources: [Box<dyn PageSource>; 4] = [
            Box::new(late.clone()),
            Box::new(Threaded::new(memory, 2)),
            Box::new(Threaded::new(late, 1)),
            Box::new(FaultySource::new(Arc::new(Threaded::new(slow, 2)), u64::MAX, Fault::Error)),
        ];
        for (i, source) in sources.iter().enumerate() {
            let dropped = Arc::new(AtomicBool::new(false));
            let seen = Arc::clone(&dropped);
            let sink = Collector::with_hook(move |run| {
                assert!(!seen.load(Ordering::Acquire), "{run} after the drop");
                Reply::Taken
            });
            let feed = source.start(sink.clone()).unwrap();
            match number % 4 {
                // Nothing was asked for.
                0 => {}
                // Everything is under way.
                1 => _ = feed.request(run(0, 1024), Urgency::Background),
                // A thread stands at the gate: dropping turns it back.
                2 if i == 0 => {
                    gate.close();
                    feed.request(run(0, 1024), Urgency::Demand);
                    gate.wait_for(1);
                }
                // All of it has been done.
                _ => {
                    gate.open();
                    feed.request(run(0, 30), Urgency::Demand);
                    while sink.state.lock().pages.range(..(BlockId(0), PageIndex(30))).count() < 30 {
                        std::thread::yield_now();
                    }
                }
            }
            drop(feed);
            dropped.store(true, Ordering::Release);
            let runs = sink.state.lock().runs.len();
            gate.open();
            std::thread::yield_now();
            assert_eq!(sink.state.lock().runs.len(), runs);
            assert!(matches!(sink.state.lock().ends[..], [End::Stopped]));
        }
    }
}

#[test]
fn a_panic_is_told_once_and_after_everything_else() {
    let oracle = oracle();
    for at in [0, 3] {
        let faulty = FaultySource::new(Arc::new(MemorySource::new(Arc::clone(&oracle))), at, Fault::Panic);
        let source = Threaded::new(faulty, 3);
        let sink = Collector::new();
        let feed = source.start(sink.clone()).unwrap();
        feed.request(run(0, 1024), Urgency::Background);
        while sink.state.lock().ends.is_empty() {
            std::thread::yield_now();
        }
        let runs = sink.state.lock().runs.len();
        feed.request(run(0, 1), Urgency::Demand);
        drop(feed);
        let state = sink.state.lock();
        assert_eq!(state.runs.len(), runs);
        assert!(matches!(&state.ends[..], [End::Broken(error)] if error.to_string().contains("panicked")));
    }
}

#[test]
fn a_source_whose_thread_dies_ends_the_flow_at_once() {
    let oracle = oracle();
    let faulty = FaultySource::new(Arc::new(MemorySource::new(oracle)), 1, Fault::Silence);
    let source = Threaded::new(faulty, 1);
    let sink = Collector::new();
    let feed = source.start(sink.clone()).unwrap();
    feed.request(run(0, 1024), Urgency::Background);
    while sink.state.lock().ends.is_empty() {
        std::thread::yield_now();
    }
    drop(feed);
    assert_eq!(sink.state.lock().pages.len(), 64);
    assert!(matches!(sink.state.lock().ends[..], [End::Broken(_)]));
}

#[test]
fn finishing_asks_the_source_itself_after_its_threads_have_ended() {
    let memory = MemorySource::new(oracle());
    for (altered, sink_stops) in [(false, false), (true, false), (false, true), (true, true)] {
        let sink = Collector::with_hook(move |_| match sink_stops {
            true => SinkError::stopped("enough").into(),
            false => Reply::Taken,
        });
        let feed = match altered {
            true => Threaded::new(Altered::new(memory.clone()), 2).start(sink.clone()),
            false => Threaded::new(memory.clone(), 2).start(sink.clone()),
        };
        let feed = feed.unwrap();
        assert_eq!(feed.request(run(0, 8), Urgency::Demand), Answer::Later);
        assert_eq!(feed.finish().is_err(), altered);
        assert_eq!(sink.state.lock().ends.len(), 1);
    }
}
