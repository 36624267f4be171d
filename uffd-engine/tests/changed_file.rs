//! A snapshot file that changes under a guest that runs from it: what can't be vouched for is refused, and the error names
//! the file, the block and the place.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::refused::right_or_refused;
use common::scripted::full;
use common::{Kind, Memory, PAGE};
use page_files::MappedRam;
use page_source::SourceErrorKind;
use page_units::{BlockId, PageIndex, PageRun};
use testkit::hugepages::Overcommit;
use testkit::oracle::Oracle;
use uffd_engine::{Background, EngineError};
use vmstate::{Configuration, DeviceWriter};

const PAGES: u64 = 8 * 512;
const KINDS: [Kind; 4] = [Kind::Anonymous, Kind::MemfdShared, Kind::HugetlbPrivate, Kind::HugetlbAlias];

fn snapshot(dir: &Path, oracle: &Oracle) -> PathBuf {
    let path = dir.join("snapshot");
    let devices = DeviceWriter::new(2).finish("testkit").unwrap();
    oracle.write_mapped_ram(&path, &Configuration::new("testkit"), &devices).unwrap();
    path
}

/// Where in the file a page is stored.
fn offset_of(path: &Path, oracle: &Oracle, page: u64) -> u64 {
    let wanted = oracle.run(PageRun::single(BlockId(0), PageIndex(page)));
    let bytes = std::fs::read(path).unwrap();
    let at = bytes.chunks(PAGE).position(|found| found == wanted).unwrap();
    (at * PAGE) as u64
}

#[test]
fn a_file_that_is_truncated() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(PAGES / 512).unwrap();
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let oracle = full(PAGES);
        let path = snapshot(dir.path(), &oracle);
        let memory = Memory::new(kind, oracle.layout());
        let source = Arc::new(MappedRam::open(&path).unwrap());
        let engine = memory.engine(source).background(Background::default().paused()).start().unwrap();
        assert!(
            memory.read(BlockId(0), PageIndex(7)).unwrap() == oracle.run(PageRun::single(BlockId(0), PageIndex(7)))
        );
        // In the middle of the second huge page: what comes behind is gone as well.
        let cut = offset_of(&path, &oracle, 800);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(cut).unwrap();
        let touched = memory.read(BlockId(0), PageIndex(900)).unwrap_err();
        assert_eq!(touched.raw_os_error(), Some(libc::EFAULT), "{kind:?}");
        let error = engine.wait().unwrap_err();
        let EngineError::Source { run, error: why, .. } = &error else { panic!("{kind:?}: {error}") };
        assert!(run.iter().any(|page| page.0 == 900), "{kind:?}: {error}");
        assert!(matches!(why.kind(), SourceErrorKind::Truncated | SourceErrorKind::Changed), "{kind:?}: {error}");
        let text = error.to_string();
        for part in [path.to_str().unwrap(), "\"ram\"", "offset", "of RAM block \"ram\""] {
            assert!(text.contains(part), "{kind:?}: no {part} in {text}");
        }
        let refused = right_or_refused(&memory, &oracle);
        assert!((PAGES - 1024..PAGES).contains(&refused), "{kind:?}: {refused}");
        drop(engine);
        assert_eq!(right_or_refused(&memory, &oracle), refused, "{kind:?}");
    }
}

/// Everything has been loaded when the file is written to: nothing of it can be trusted, and the engine does not become
/// complete.
#[test]
fn a_file_that_is_rewritten_in_place_is_noticed_at_the_end() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(PAGES / 512).unwrap();
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let oracle = full(PAGES);
        let path = snapshot(dir.path(), &oracle);
        let memory = Memory::new(kind, oracle.layout());
        let source = Arc::new(MappedRam::open(&path).unwrap());
        let engine = memory.engine(source).background(Background::default().paused()).start().unwrap();
        memory.assert_equals(&oracle);
        // A page is counted after its waiters go on.
        while engine.missing().0 > 0 {
            std::thread::yield_now();
        }
        let at = offset_of(&path, &oracle, 3);
        File::options().write(true).open(&path).unwrap().write_all_at(&[0x77; PAGE], at).unwrap();
        engine.resume_background();
        let error = engine.wait().unwrap_err();
        assert!(
            matches!(&error, EngineError::Broken(why) if why.kind() == SourceErrorKind::Changed),
            "{kind:?}: {error}"
        );
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

/// The same while pages are missing: it is noticed within a few pages, long before all of them are served, and from then
/// on nothing more of the file reaches the guest.
#[test]
fn a_file_that_is_rewritten_in_place_is_noticed_on_demand() {
    testkit::require!(Userfaultfd, Hugepages);
    let _pages = Overcommit::reserve(PAGES / 512).unwrap();
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let oracle = full(PAGES);
        let path = snapshot(dir.path(), &oracle);
        let memory = Memory::new(kind, oracle.layout());
        let source = Arc::new(MappedRam::open(&path).unwrap());
        let engine = memory.engine(source).background(Background::default().paused()).start().unwrap();
        memory.load(BlockId(0), PageIndex(7));
        let at = offset_of(&path, &oracle, PAGES - 1);
        File::options().write(true).open(&path).unwrap().write_all_at(&[0x77; PAGE], at).unwrap();
        // Not the last huge page, where it was written to.
        let refused = (0..PAGES - 512).find(|&page| memory.read(BlockId(0), PageIndex(page)).is_err());
        assert!(refused.is_some(), "{kind:?}: nothing was noticed");
        assert!(memory.read(BlockId(0), PageIndex(PAGES - 1)).is_err(), "{kind:?}");
        let error = engine.wait().unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{kind:?}: {error}");
        assert!(right_or_refused(&memory, &oracle) >= 512, "{kind:?}");
    }
}
