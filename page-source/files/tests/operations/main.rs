//! What is done to a file while a guest runs from it, at whatever moment and wherever it lies: what leaves the bytes alone
//! disturbs nobody; what changes them is never taken for content.

mod disk;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use disk::{Disk, Habits};
use page_files::{FlatBlock, FlatFile, FlatOptions, MappedRam, Watch};
use page_source::{PageSource, SourceError, SourceErrorKind, Urgency};
use page_units::{BlockId, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use testkit::collector::{Collector, Got};
use testkit::oracle::Oracle;
use testkit::seed::seeds;
use vmstate::{Configuration, DeviceWriter};

const PAGES: u64 = 600;

/// Where a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Where temporary files are: ext4, usually.
    Disk,
    Tmpfs,
    Fuse,
}

/// What kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Flat,
    MappedRam,
}

/// A file with the oracle's content, and what has to be there for it.
struct Laid {
    path: PathBuf,
    disk: Option<Disk>,
    _directory: tempfile::TempDir,
}

fn oracle(seed: u64) -> Oracle {
    let block = RamBlock::new("ram", PageCount(PAGES).to_bytes(), PageSize::SMALL).unwrap();
    Oracle::random(seed, Layout::new(vec![block]).unwrap(), 150)
}

impl Laid {
    fn new(place: Place, format: Format, oracle: &Oracle, habits: Habits) -> Laid {
        let root = if place == Place::Tmpfs { "/dev/shm".into() } else { std::env::temp_dir() };
        let directory = tempfile::tempdir_in(root).unwrap();
        let path = directory.path().join("ram");
        match format {
            Format::Flat => drop(oracle.write_flat(&path).unwrap()),
            Format::MappedRam => {
                let devices = DeviceWriter::new(2).finish("testkit").unwrap();
                oracle.write_mapped_ram(&path, &Configuration::new("testkit"), &devices).unwrap();
            }
        }
        let file = File::options().read(true).write(true).open(&path).unwrap();
        // In the past, so that the clock's granularity hides no change.
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        if place != Place::Fuse {
            return Laid { path, disk: None, _directory: directory };
        }
        let disk = Disk::mount(file, habits);
        assert!(disk::is_fuse(&disk.path()));
        Laid { path: disk.path(), disk: Some(disk), _directory: directory }
    }

    fn source(&self, format: Format, oracle: &Oracle, watch: Watch) -> Result<Box<dyn PageSource>, SourceError> {
        Ok(match format {
            Format::Flat => {
                let blocks = FlatBlock::concatenated(oracle.layout().blocks().to_vec()).unwrap();
                Box::new(FlatFile::open_with(&self.path, blocks, &FlatOptions::default().with_watch(watch))?)
            }
            Format::MappedRam => {
                Box::new(MappedRam::open_with(&self.path, &mapped_ram::Options::default().with_watch(watch))?)
            }
        })
    }
}

/// Does something that leaves the bytes alone to the file that is called `path` now, and answers how it is called then;
/// `None` if it has no name any more.
fn harmless(random: &mut StdRng, path: Option<&Path>) -> Option<PathBuf> {
    let path = path?;
    let other = path.with_file_name(format!("other{}", random.random::<u32>()));
    match random.random_range(0..7) {
        0 => fs::hard_link(path, other).unwrap(),
        1 => {
            fs::hard_link(path, &other).unwrap();
            fs::remove_file(other).unwrap();
        }
        2 => fs::set_permissions(path, Permissions::from_mode(0o400 + random.random_range(0..0o100))).unwrap(),
        3 => {
            fs::rename(path, &other).unwrap();
            return Some(other);
        }
        4 => std::os::unix::fs::chown(path, Some(nix::unistd::geteuid().as_raw()), None).unwrap(),
        5 => drop(fs::read(path).unwrap()),
        _ if random.random_range(0..4) == 0 => {
            fs::remove_file(path).unwrap();
            return None;
        }
        _ => {}
    }
    Some(path.to_owned())
}

/// Asks for pages somewhere, and compares what comes with the oracle; what fails, if something does.
fn ask(source: &dyn PageSource, oracle: &Oracle, random: &mut StdRng) -> Result<(), String> {
    let sink = Collector::new();
    let feed = source.start(sink.clone()).map_err(|error| error.to_string())?;
    let first = random.random_range(0..PAGES);
    let pages = random.random_range(1..=(PAGES - first).min(80));
    let urgency = if random.random() { Urgency::Demand } else { Urgency::Background };
    let run = PageRun::new(BlockId(0), PageIndex(first), PageCount(pages));
    feed.request(run, urgency);
    for page in run.iter() {
        let expected = oracle.run(PageRun::single(BlockId(0), page));
        match sink.once(0, page.0) {
            Got::Data(bytes) => assert!(bytes == expected, "page {page}"),
            Got::Zero => assert!(expected.iter().all(|&byte| byte == 0), "page {page} is not zero"),
            Got::Absent => panic!("page {page} is absent"),
            Got::Failed(why) => return Err(why),
        }
    }
    feed.finish().map_err(|error| error.to_string())
}

/// Whether what has come from a source can be trusted.
fn verify(source: &dyn PageSource) -> Result<(), SourceError> {
    source.start(Collector::new())?.finish()
}

const PLACES: [Place; 3] = [Place::Disk, Place::Tmpfs, Place::Fuse];

fn cases(count: u64) -> impl Iterator<Item = (u64, Place, Format)> {
    seeds(count).map(|(number, seed)| {
        let place = PLACES[usize::try_from(number).unwrap() % PLACES.len()];
        (seed, place, if number / 3 % 2 == 0 { Format::Flat } else { Format::MappedRam })
    })
}

#[test]
fn what_leaves_the_bytes_alone_disturbs_nobody() {
    testkit::require!(Fuse);
    for (seed, place, format) in cases(36) {
        let mut random = StdRng::seed_from_u64(seed);
        let oracle = oracle(seed);
        let laid = Laid::new(place, format, &oracle, Habits::default());
        let source = laid.source(format, &oracle, Watch::Content).unwrap();
        let mut path = Some(laid.path.clone());
        for _ in 0..30 {
            if random.random() {
                path = harmless(&mut random, path.as_deref());
            }
            ask(&*source, &oracle, &mut random)
                .unwrap_or_else(|why| panic!("seed {seed}, {place:?}, {format:?}: {why}"));
        }
        verify(&*source).unwrap();
    }
}

/// Writes, cuts, or touches.
fn harmful(random: &mut StdRng, file: &File) -> &'static str {
    let size = file.metadata().unwrap().len();
    match random.random_range(0..4) {
        0 => file.write_all_at(&[0x55; 100], random.random_range(0..size - 100)).unwrap(),
        1 => {
            file.set_len(random.random_range(0..size)).unwrap();
            return "its size";
        }
        2 => {
            // As large as before, and all zeros behind the cut.
            file.set_len(random.random_range(0..size)).unwrap();
            file.set_len(size).unwrap();
        }
        _ => {
            file.set_len(size + 1).unwrap();
            return "its size";
        }
    }
    "its modification time"
}

#[test]
fn what_changes_the_bytes_is_named_and_never_taken_for_content() {
    for (seed, place, format) in cases(36).filter(|(_, place, _)| *place != Place::Fuse) {
        let mut random = StdRng::seed_from_u64(seed);
        let oracle = oracle(seed);
        let laid = Laid::new(place, format, &oracle, Habits::default());
        let source = laid.source(format, &oracle, Watch::Content).unwrap();
        let file = File::options().write(true).open(&laid.path).unwrap();
        for _ in 0..random.random_range(0..10) {
            ask(&*source, &oracle, &mut random).unwrap();
        }
        let what = harmful(&mut random, &file);
        for _ in 0..10 {
            let why = ask(&*source, &oracle, &mut random).unwrap_err();
            assert!(why.contains(what) && why.contains(laid.path.to_str().unwrap()), "seed {seed}: {what}: {why}");
            assert!(why.contains("changed"), "seed {seed}: {why}");
        }
        assert_eq!(verify(&*source).unwrap_err().kind(), SourceErrorKind::Changed, "seed {seed}");
    }
}

#[test]
fn the_strict_watch_takes_a_link_for_a_change() {
    for place in [Place::Disk, Place::Tmpfs] {
        let oracle = oracle(1);
        let laid = Laid::new(place, Format::Flat, &oracle, Habits::default());
        let source = laid.source(Format::Flat, &oracle, Watch::Strict).unwrap();
        let ctime = || mapped_ram::Identity::of(&File::open(&laid.path).unwrap()).unwrap().changed;
        let before = ctime();
        while ctime() == before {
            fs::hard_link(&laid.path, laid.path.with_extension("link")).unwrap();
            fs::remove_file(laid.path.with_extension("link")).unwrap();
        }
        let error = verify(&*source).unwrap_err();
        assert!(error.kind() == SourceErrorKind::Changed && error.to_string().contains("its change time"), "{error}");
    }
}

/// The error names the cure, and it is one.
#[test]
fn a_file_system_that_moves_times_by_itself_is_named_with_the_option_that_helps() {
    testkit::require!(Fuse);
    let habits = Habits { moves_times: true, ..Habits::default() };
    for format in [Format::Flat, Format::MappedRam] {
        let mut random = StdRng::seed_from_u64(2);
        let oracle = oracle(2);
        let laid = Laid::new(Place::Fuse, format, &oracle, habits);
        let failed = match laid.source(format, &oracle, Watch::Content) {
            Ok(source) => ask(&*source, &oracle, &mut random).unwrap_err(),
            Err(error) => error.to_string(),
        };
        assert!(failed.contains("its modification time") && failed.contains("Watch::Size"), "{failed}");
        let source = laid.source(format, &oracle, Watch::Size).unwrap();
        for _ in 0..30 {
            ask(&*source, &oracle, &mut random).unwrap();
        }
        verify(&*source).unwrap();
        assert!(laid.disk.is_some());
    }
}

#[test]
fn demand_and_background_agree_where_a_file_system_calls_data_a_hole() {
    testkit::require!(Fuse);
    for (number, seed) in seeds(6) {
        let habits = Habits { calls_data_a_hole: number % 2 == 0, ..Habits::default() };
        let mut random = StdRng::seed_from_u64(seed);
        let oracle = oracle(seed);
        let laid = Laid::new(Place::Fuse, Format::Flat, &oracle, habits);
        let source = laid.source(Format::Flat, &oracle, Watch::Content).unwrap();
        for _ in 0..60 {
            ask(&*source, &oracle, &mut random).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        }
        verify(&*source).unwrap();
    }
}
