//! A process that locks all its memory (mlockall), in which new mappings are populated.

mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::refused::right_or_refused;
use common::scripted::full;
use common::{Kind, Memory};
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use page_units::{BlockId, PageIndex};
use testkit::source::MemorySource;
use uffd_engine::{Background, Discards, StartError};

const PAGES: u64 = 64;

/// The pages with which its handlers are woken are not there either.
#[test]
fn an_engine_in_a_process_that_locks_its_memory_ends() {
    testkit::require!(Root, Userfaultfd);
    let oracle = full(PAGES);
    for discards in [Discards::Announced, Discards::Events] {
        // Mapped before: what a guest has not touched is missing.
        let memory = Memory::new(Kind::Anonymous, oracle.layout());
        let start = |memory: &Memory| {
            let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
            memory.engine(source).background(Background::off()).discards(discards).start()
        };
        mlockall(MlockAllFlags::MCL_FUTURE).unwrap();
        let started = start(&memory);
        let populated = start(&Memory::new(Kind::Anonymous, oracle.layout()));
        munlockall().unwrap();
        assert!(matches!(populated, Err(StartError::Region { .. })), "{populated:?}");
        let engine = started.unwrap();
        memory.load(BlockId(0), PageIndex(5));
        let (tell, ended) = channel();
        std::thread::spawn(move || {
            drop(engine);
            tell.send(()).unwrap();
        });
        ended.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{discards:?}: it hangs"));
        assert_eq!(right_or_refused(&memory, &oracle), PAGES - 1);
    }
}
