//! Somebody reads all of the process's memory, as a debugger, a core dump or a checkpoint does: pages of the engine's own
//! among it.

mod common;

use std::fs;
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::scripted::full;
use common::{Kind, Memory};
use nix::sys::mman::{MlockAllFlags, mlockall, munlockall};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use page_units::{BlockId, PageIndex, PageRun};
use testkit::source::MemorySource;
use uffd_engine::{Background, Discards, Handlers};

const PAGES: u64 = 1024;
/// Longer mappings are the guest's, or heaps.
const SMALL: usize = 256 << 10;

/// Reads every small mapping without a file.
fn read_all_memory() {
    let mut page = [0; 4096];
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let (start, end) = (usize::from_str_radix(start, 16).unwrap(), usize::from_str_radix(end, 16).unwrap());
        if end - start > SMALL || !rest.starts_with("rw-p") || rest.contains('/') || rest.contains('[') {
            continue;
        }
        for base in (start..end).step_by(page.len()) {
            let remote = [RemoteIoVec { base, len: page.len() }];
            // Some of it is gone by now.
            let _ = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut page)], &remote);
        }
    }
}

fn lock_all_memory() {
    // Refused where too much would be locked: what it has touched is touched.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT);
    munlockall().unwrap();
}

/// Does `act` on a thread of its own.
fn done_in_time(what: &str, act: impl FnOnce() + Send + 'static) {
    let (tell, done) = channel();
    std::thread::spawn(move || {
        act();
        tell.send(()).unwrap();
    });
    done.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{what}: it hangs"));
}

/// In one test, since the reader reads the memory of every engine of this process.
#[test]
fn a_reader_of_all_memory_goes_on_and_so_does_the_engine_which_ends() {
    testkit::require!(Root, Userfaultfd);
    let oracle = full(PAGES);
    for (act, what) in [(read_all_memory as fn(), "read"), (lock_all_memory, "locked")] {
        for discards in [Discards::Announced, Discards::Events] {
            for handlers in [1, 2] {
                let memory = Memory::new(Kind::Anonymous, oracle.layout());
                let source = Arc::new(MemorySource::new(Arc::clone(&oracle)));
                let builder = memory.engine(source).background(Background::off()).discards(discards);
                let engine = builder.handlers(Handlers::threads(handlers)).start().unwrap();
                // Long enough undisturbed for a handler that is alone to park.
                for page in 0..40 {
                    memory.load(BlockId(0), PageIndex(page));
                }
                let case = format!("{what}, {discards:?}, {handlers} handlers");
                for _ in 0..3 {
                    done_in_time(&case, act);
                }
                let page = PageIndex(PAGES - 1);
                let right = memory.load(BlockId(0), page) == oracle.run(PageRun::single(BlockId(0), page));
                assert!(right, "{case}");
                done_in_time(&case, move || drop(engine));
            }
        }
    }
}
