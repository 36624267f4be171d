//! Each thread of an engine runs where it was told to, and nowhere else.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::collector::layout;
use common::{Kind, Memory};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use testkit::oracle::Oracle;
use testkit::source::MemorySource;
use uffd_engine::{Background, Handlers};

/// The cores that each thread of an engine may run on, as the kernel lists them. (No other test is in this file: they
/// are the threads of one engine.)
fn placed() -> BTreeMap<String, String> {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten().filter_map(|thread| {
        let name = fs::read_to_string(thread.path().join("comm")).ok()?.trim().to_owned();
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned();
        Some((name, cores)).filter(|(name, _)| name.starts_with("uffd-fault-") || name.starts_with("uffd-load-"))
    });
    threads.collect()
}

#[test]
fn threads_are_on_the_cores_they_were_given() {
    testkit::require!(Userfaultfd, TwoCpus);
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let mut cores = (0..CpuSet::count()).filter(|&core| allowed.is_set(core).unwrap_or(false));
    let (one, other) = (cores.next().unwrap(), cores.next().unwrap());
    let oracle = Arc::new(Oracle::random(1, layout(&[64]), 200));
    let memory = Memory::new(Kind::Anonymous, oracle.layout());
    let engine = memory
        .engine(Arc::new(MemorySource::new(Arc::clone(&oracle))))
        .handlers(Handlers::on_cores([other, one]))
        .background(Background::default().paused().with_threads(3).on_cores([one, other]))
        .start()
        .unwrap();
    let expected = [
        ("uffd-fault-0", other),
        ("uffd-fault-1", one),
        ("uffd-load-0", one),
        ("uffd-load-1", other),
        // In turn.
        ("uffd-load-2", one),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(name, core)| (name.to_owned(), core.to_string())).into();
    // Each binds itself, when it begins.
    let begun = Instant::now();
    while placed() != expected {
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?} instead of {expected:?}", placed());
        std::thread::yield_now();
    }
    engine.resume_background();
    engine.wait().unwrap();
    memory.assert_equals(&oracle);
    assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), allowed, "and the caller is where it was");
}
