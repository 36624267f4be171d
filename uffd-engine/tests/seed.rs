//! Memory of which a part is there before it is served, that is served on when it is complete, and what an engine that has
//! nothing to do costs.

mod common;

use std::fs;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::discards::{Way, discard};
use common::scripted::{Scripted, full};
use common::{Kind, Memory, SMALL_KINDS};
use page_source::Reply;
use page_units::{BlockId, PageCount, PageIndex, PageRun};
use testkit::source::MemorySource;
use uffd_engine::{Background, Event, StartError, WhenComplete};

const BLOCK: BlockId = BlockId(0);

fn run(first: u64, pages: u64) -> PageRun {
    PageRun::new(BLOCK, PageIndex(first), PageCount(pages))
}

#[test]
fn a_late_peer_is_asked_only_for_what_is_not_there() {
    testkit::require!(Userfaultfd);
    for kind in SMALL_KINDS {
        let oracle = full(64);
        let memory = Memory::new(kind, oracle.layout());
        let there = [run(0, 8), run(32, 1)];
        for page in there.iter().flat_map(|run| run.iter()) {
            memory.store(BLOCK, page, oracle.run(PageRun::single(BLOCK, page)));
        }
        let peer = Scripted::new(Arc::clone(&oracle));
        let engine = memory.engine(peer.peer()).present(there).start().unwrap();
        while peer.asked().iter().map(|run| run.pages.0).sum::<u64>() < 55 {
            std::thread::yield_now();
        }
        for asked in peer.asked() {
            assert!(there.iter().all(|run| run.intersect(asked).is_empty()), "{kind:?}: {asked} is there");
            assert!(matches!(peer.push(asked), Reply::Taken));
        }
        engine.wait().unwrap();
        memory.assert_equals(&oracle);
    }
}

#[test]
fn pages_that_are_no_whole_granules_of_a_region_are_not_taken_for_present() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let refused = memory.engine(source).present([run(60, 8)]).start().unwrap_err();
    assert!(matches!(refused, StartError::Incomplete(_)), "{refused}");
}

#[test]
fn an_engine_that_stays_armed_serves_what_is_given_back_after_it_was_complete() {
    testkit::require!(Userfaultfd);
    for kind in [Kind::Anonymous, Kind::MemfdShared] {
        for way in [Way::EngineAnnounced, Way::Kernel] {
            let oracle = full(64);
            let memory = Memory::new(kind, oracle.layout());
            let (tell, heard) = mpsc::channel();
            let engine = memory
                .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
                .discards(way.discards())
                .when_complete(WhenComplete::StayArmed)
                .observer(move |event| tell.send(event.clone()).unwrap())
                .start()
                .unwrap();
            engine.wait().unwrap();
            assert_eq!(engine.missing(), PageCount(0));
            memory.assert_equals(&oracle);
            let faults = engine.stats().demand_faults;
            discard(way, &engine, &memory, run(8, 4));
            assert_eq!(memory.load(BLOCK, PageIndex(9)), vec![0; 4096]);
            assert!(engine.stats().demand_faults > faults, "it is still registered");
            memory.store(BLOCK, PageIndex(9), &[7; 4096]);
            drop(engine);
            // Ordinary memory, in which everything is that was there.
            assert_eq!(memory.load(BLOCK, PageIndex(9)), vec![7; 4096]);
            assert_eq!(memory.load(BLOCK, PageIndex(63)), oracle.run(run(63, 1)));
            let events: Vec<_> = heard.iter().collect();
            let complete = events.iter().filter(|event| matches!(event, Event::Complete { .. })).count();
            assert_eq!(complete, 1, "{events:?}");
            assert!(!events.iter().any(|event| matches!(event, Event::Failed(_))), "{events:?}");
        }
    }
}

/// Of the threads of this process whose name begins with `uffd-`.
fn context_switches() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let of = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let ours = field("Name:")?.starts_with("uffd-");
        let switches = |name| field(name)?.parse::<u64>().ok();
        ours.then_some(switches("voluntary_ctxt_switches:")? + switches("nonvoluntary_ctxt_switches:")?)
    };
    tasks.filter_map(|task| of(task.ok()?)).sum::<u64>()
}

/// The other tests of this file have engines, too: it is run in a process of its own.
#[test]
fn an_engine_with_nothing_to_do_wakes_no_thread() {
    testkit::require!(Userfaultfd);
    if std::env::var_os("FASTLOAD_IDLE").is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "an_engine_with_nothing_to_do_wakes_no_thread"]).env("FASTLOAD_IDLE", "1");
        assert!(child.status().unwrap().success());
        return;
    }
    let oracle = full(64);
    let source = || Arc::new(MemorySource::new(Arc::clone(&oracle)));
    let [armed, paused, silent] = [(); 3].map(|()| Memory::new(Kind::Anonymous, oracle.layout()));
    let complete = armed.engine(source()).when_complete(WhenComplete::StayArmed).start().unwrap();
    complete.wait().unwrap();
    let waits = paused.engine(source()).background(Background::default().paused()).start().unwrap();
    let peer = Scripted::new(Arc::clone(&oracle));
    let late = silent.engine(peer.peer()).start().unwrap();
    while peer.asked().iter().map(|run| run.pages.0).sum::<u64>() < 64 {
        std::thread::yield_now();
    }
    // They come to rest.
    let mut before = context_switches();
    loop {
        assert!(late.wait_for(Duration::from_millis(50)).is_none());
        let now = context_switches();
        if std::mem::replace(&mut before, now) == now {
            break;
        }
    }
    // The end does not come: for so long nothing may happen.
    assert!(late.wait_for(Duration::from_millis(500)).is_none());
    assert_eq!(context_switches(), before);
    drop((complete, waits, late));
}

#[test]
fn a_source_that_never_answers_is_told_of_and_can_be_asked_for() {
    testkit::require!(Userfaultfd);
    let oracle = full(64);
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let peer = Scripted::new(Arc::clone(&oracle));
    let (tell, heard) = mpsc::channel();
    let engine = memory
        .engine(peer.peer())
        .background(Background::off())
        .report_waits_after(Duration::from_millis(1))
        .observer(move |event| tell.send(event.clone()).unwrap())
        .start()
        .unwrap();
    assert!(engine.waiting().is_empty());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| memory.read(BLOCK, PageIndex(7)));
        let waits = heard.iter().find_map(|event| match event {
            Event::Waiting { run, time } => Some((run, time)),
            _ => None,
        });
        let (waited_for, time) = waits.unwrap();
        assert!(waited_for == run(7, 1) && time >= Duration::from_millis(1));
        let asked: Vec<_> = engine.waiting().into_iter().map(|wait| wait.run).collect();
        assert_eq!(asked, [run(7, 1)]);
        assert!(matches!(peer.push(run(7, 1)), Reply::Taken));
        assert!(waiting.join().unwrap().unwrap() == oracle.run(run(7, 1)));
    });
    assert!(engine.waiting().is_empty());
    drop(engine);
    let again = heard.iter().filter(|event| matches!(event, Event::Waiting { .. })).count();
    assert_eq!(again, 0, "each wait is told once");
}
