//! Small guests are loaded from files and frozen meanwhile, while things happen that happen to VMMs: each ends exactly, or
//! with an error that names its cause, and leaves nothing behind.

#[path = "../common/mod.rs"]
mod common;
mod happening;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use common::collector::{Collector, layout};
use common::{Kind, Memory, fd_count, freezable_while_loading};
use happening::{Guest, Happening};
use page_files::MappedRam;
use page_source::{OneShot, PageSink};
use page_units::{ByteLen, PageCount};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use uffd_engine::{Background, Discards, Engine, FailurePolicy, FreezeError, FreezeOptions, Handlers, Wait};
use vmstate::{Configuration, DeviceWriter};

/// How long a VMM waits at most for the error that it has to get.
const TOLD_WITHIN: Duration = Duration::from_secs(5);
/// How long a case may take that hangs nowhere, on a machine that has much else to do.
const HUNG: Duration = Duration::from_secs(60);

fn snapshot(dir: &Path, oracle: &Oracle) -> PathBuf {
    let path = dir.join("snapshot");
    let devices = DeviceWriter::new(2).finish("testkit").unwrap();
    oracle.write_mapped_ram(&path, &Configuration::new("testkit"), &devices).unwrap();
    // In the past, so that the granularity of the file system's clock hides no change.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(60)).unwrap();
    path
}

fn start(memory: &Memory, source: MappedRam, random: &mut StdRng) -> Engine {
    let background = Background::default().with_piece(PageCount(16)).with_window(PageCount(64));
    memory
        .engine(Arc::new(source))
        .handlers(Handlers::threads(random.random_range(1..=2)).waiting(match random.random_range(0..4) {
            0 => Wait::Spin,
            _ => Wait::Block,
        }))
        .background(if random.random() { background } else { background.paused() })
        .discards(if random.random() { Discards::Events } else { Discards::Announced })
        .on_failure(if random.random() { FailurePolicy::PoisonMissing } else { FailurePolicy::PoisonFailed })
        .start()
        .unwrap()
}

/// Freezes the guest's memory, goes on with it, and compares what is saved with what was there.
fn frozen(guest: &mut Guest<'_>, engine: &Engine, random: &mut StdRng) {
    let pool = ByteLen(if random.random() { 4 << 20 } else { 1 });
    let options = FreezeOptions::default().with_pool(pool);
    let freezer = engine.freezer(guest.memory.regions(), guest.memory.layout.clone(), &options);
    let frozen = match freezer.and_then(|freezer| freezer.arm()) {
        Ok(frozen) => frozen,
        // It has failed.
        Err(FreezeError::Load(_)) if guest.harmed => return,
        Err(error) => panic!("{error}"),
    };
    let expected = guest.model.clone();
    let sink = Collector::new(&guest.memory.layout, None, u64::MAX);
    let handle = frozen.handle();
    let feed = Box::new(frozen).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    for _ in 0..random.random_range(0..20) {
        guest.access(random);
    }
    if random.random_range(0..8) == 0 {
        return drop(feed);
    }
    let complete = sink.complete();
    match handle.wait() {
        Ok(_) => {
            assert!(complete);
            sink.assert_equals(&[expected]);
        }
        Err(error) => assert!(guest.harmed || guest.discarded, "{error}"),
    }
    drop(feed);
}

fn case(seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let kinds =
        freezable_while_loading(&[Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbPrivate, Kind::HugetlbAlias]);
    let kind = kinds[random.random_range(0..kinds.len())];
    let huge = matches!(kind, Kind::HugetlbPrivate | Kind::HugetlbAlias);
    let oracle =
        Oracle::random(seed, layout(&[if huge { 1024 } else { random.random_range(1..400) }]), random.random());
    let root = if random.random() { std::env::temp_dir() } else { "/dev/shm".into() };
    let directory = tempfile::tempdir_in(root).unwrap();
    let path = snapshot(directory.path(), &oracle);
    let memory = Memory::new(kind, oracle.layout());
    let engine = start(&memory, MappedRam::open(&path).unwrap(), &mut random);
    let mut guest = Guest::new(&memory, &oracle, path);
    for _ in 0..random.random_range(1..60) {
        match random.random_range(0..10) {
            0 => frozen(&mut guest, &engine, &mut random),
            1..4 => Happening::any(&mut random).comes(&mut guest, &engine, &mut random),
            _ => guest.access(&mut random),
        }
    }
    match random.random_range(0..4) {
        0 => drop(engine),
        // What is missing of a file that changed can't come: the error says so, and soon.
        _ => {
            engine.resume_background();
            let limit = if guest.harmed { TOLD_WITHIN } else { HUNG };
            let ended = engine.wait_for(limit).expect("an engine that waits for nothing ends");
            if let Err(error) = ended {
                let text = error.to_string();
                assert!(guest.harmed && text.contains("snapshot") && text.contains("its "), "{text}");
            }
            guest.assert_memory(false);
            return;
        }
    }
    guest.assert_memory(true);
}

/// Runs a case on a thread of its own. One that hangs can't be ended: it fails the test as it is.
fn bounded(seed: u64) {
    let (tell, ended) = channel::<()>();
    let thread = std::thread::spawn(move || {
        let _tell = tell;
        case(seed);
    });
    assert_ne!(ended.recv_timeout(HUNG), Err(RecvTimeoutError::Timeout), "seed {seed} hangs");
    if let Err(panic) = thread.join() {
        eprintln!("FASTLOAD_SEED={seed} with one case repeats it");
        std::panic::resume_unwind(panic);
    }
}

/// Descriptors, threads and mappings of this process.
fn held() -> [usize; 3] {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    [fd_count(), std::fs::read_dir("/proc/self/task").unwrap().count(), maps.lines().count()]
}

#[test]
fn whatever_happens_a_guest_is_exact_or_ends_with_a_named_error() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(8).unwrap();
    let cases = if std::env::var_os("FASTLOAD_FULL").is_some() { 10_000 } else { 100 };
    let mut before = None;
    for (number, seed) in seeds(cases) {
        bounded(seed);
        // The allocator has what it needs by then.
        if number == 20 {
            before = Some(held());
        }
    }
    if let Some(before) = before {
        let after = held();
        assert!(
            after[0] <= before[0] && after[1] <= before[1] && after[2] <= before[2] + 16,
            "{before:?} to {after:?}"
        );
    }
}
