//! A host that gives no more threads: the engine does not start, whichever of its threads it was, and nobody finds wrong
//! bytes or waits for ever.

mod common;

use std::sync::Arc;

use common::refused::right_or_refused;
use common::scripted::{Scripted, full};
use common::{Kind, Memory};
use page_source::Source;
use testkit::few_threads;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Builder, Engine, Handlers, StartError};

const PAGES: u64 = 300;
/// Two handlers, two loaders, a supervisor.
const THREADS: u64 = 5;

fn start(builder: Builder) -> Result<Engine, StartError> {
    builder.handlers(Handlers::threads(2)).background(Background::default().with_threads(2)).start()
}

fn no_thread(error: &StartError) -> bool {
    let StartError::System { what, error } = error else { panic!("{error}") };
    *what == "a thread of the engine" && error.raw_os_error() == Some(libc::EAGAIN)
}

/// Loaders that find the source broken may have ended before the last thread begins.
fn enough(threads: u64, answers: bool) -> bool {
    threads == THREADS || !answers
}

/// Sources that answer, and that are broken before there is a thread to see it.
fn sources(oracle: &Arc<Oracle>) -> [(bool, Source); 2] {
    let broken = Scripted::new(Arc::clone(oracle)).broken_at_start();
    [(true, Arc::new(MemorySource::new(Arc::clone(oracle))).into()), (false, Box::new(broken).into())]
}

#[test]
fn memory_of_our_own_is_let_go() {
    testkit::require!(Root, Userfaultfd);
    let oracle = full(PAGES);
    for threads in 0..=THREADS {
        for (answers, source) in sources(&oracle) {
            let memory = Memory::new(Kind::Anonymous, oracle.layout());
            match few_threads(threads, || start(memory.engine(source))) {
                Err(error) => {
                    assert!(threads < THREADS && no_thread(&error), "{threads}: {error}");
                    // No thread serves it, so a fault would wait for ever. What came is right.
                    for run in memory.layout.runs() {
                        for page in run.iter() {
                            let bytes = memory.load(run.block, page);
                            let right = bytes == oracle.run(page_units::PageRun::single(run.block, page));
                            assert!(right || bytes.iter().all(|&byte| byte == 0), "{threads}: page {page}");
                        }
                    }
                }
                Ok(engine) => {
                    assert!(enough(threads, answers), "{threads}");
                    assert_eq!(engine.wait().is_ok(), answers);
                    let refused = right_or_refused(&memory, &oracle);
                    assert_eq!(refused, if answers { 0 } else { PAGES });
                }
            }
        }
    }
}

/// Its owner would go on with zeros: so what is missing is poisoned.
#[test]
fn memory_that_was_handed_over_is_poisoned() {
    testkit::require!(Root, Userfaultfd, Poison);
    let oracle = full(PAGES);
    for threads in 0..=THREADS {
        for (answers, source) in sources(&oracle) {
            let memory = Memory::new(Kind::Anonymous, oracle.layout());
            let descriptor = memory.handed_over();
            let started = few_threads(threads, || start(memory.engine(source).descriptor(descriptor)));
            assert!(started.is_err() || enough(threads, answers), "{threads}");
            assert!(started.is_ok() || threads < THREADS);
            match started {
                Err(error) => {
                    assert!(no_thread(&error), "{threads}: {error}");
                    let refused = right_or_refused(&memory, &oracle);
                    assert!(answers || refused == PAGES, "{threads}: {refused}");
                }
                Ok(engine) => {
                    assert_eq!(engine.wait().is_ok(), answers);
                    assert_eq!(right_or_refused(&memory, &oracle), if answers { 0 } else { PAGES });
                }
            }
        }
    }
}
