//! Damaged and hostile files: an error that says where, never a panic, a hang or much memory.

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{mapped_samples, samples};
use mapped_ram::{OpenErrorKind, Options, Snapshot, Warning, Writer};
use page_units::{BlockId, Layout, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use proptest::prelude::*;
use vmstate::{Configuration, SectionKind};

/// Does everything that a reader can do with a file.
fn exercise(path: &Path, damaged: bool) {
    let snapshot = match Snapshot::open_with(path, &Options::default().with_damaged(damaged)) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            let line = error.to_string();
            assert!(line.contains(&path.display().to_string()) && !line.contains('\n'), "{line}");
            return;
        }
    };
    for (block, ram) in snapshot.layout().iter() {
        let mut page = PageIndex(0);
        while page.0 < ram.pages().0 {
            let Ok(found) = snapshot.load_run(block, page, ram.pages()) else { break };
            let run = found.pages();
            assert!(run.0 > 0 && page.0 + run.0 <= ram.pages().0);
            page += run;
        }
        let _ = snapshot.stored_pages(block);
    }
    for entry in snapshot.sections().iter().filter(|entry| entry.kind == SectionKind::Full) {
        if let Ok(Some(device)) = snapshot.device(&entry.name, entry.instance)
            && let Ok(value) = device.decode()
        {
            let mut again = Vec::new();
            value.encode(&mut again);
            assert_eq!(again, device.body());
        }
    }
    let _ = snapshot.diagnose();
    let _ = snapshot.read(snapshot.tail());
}

/// A small file with the devices of a real one.
fn small(directory: &Path) -> PathBuf {
    let all = samples::stripped();
    let sample = all.iter().find(|sample| sample.name == "q10-microvm-32-plain.mr").unwrap();
    let from = Snapshot::open(sample.unpack(directory).unwrap()).unwrap();
    let ram = |name: &str, pages| RamBlock::new(name, PageCount(pages).to_bytes(), PageSize::SMALL).unwrap();
    let layout = Layout::new(vec![ram("microvm.ram", 100), ram("pc.bios", 3)]).unwrap();
    let path = directory.join("small");
    let writer = Writer::create(&path, from.configuration(), layout).unwrap();
    for page in [0, 1, 50, 99] {
        writer.write(PageRun::single(BlockId(0), PageIndex(page)), &[9; 4096]).unwrap();
    }
    writer.finish(&from.read(from.tail()).unwrap()).unwrap();
    path
}

/// The parts of a file that are not pages.
fn metadata(snapshot: &Snapshot) -> Vec<(u64, u64)> {
    let mut areas = vec![(snapshot.base().0, 200)];
    for (id, ram) in snapshot.layout().iter() {
        let file = snapshot.block(id).unwrap();
        let name = ram.name().len() as u64;
        areas.push((file.header_offset.0 - 17 - name, 17 + name + 28 + file.bitmap_len.0));
    }
    areas.push((snapshot.tail().start.0 - 80, snapshot.tail().end.0 - snapshot.tail().start.0 + 80));
    areas
}

struct Original {
    file: File,
    at: u64,
    bytes: Vec<u8>,
}

impl Original {
    /// Changes bytes in place, until dropped.
    fn change(path: &Path, at: u64, new: &[u8]) -> Original {
        let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut bytes = vec![0; new.len()];
        let length = file.read_at(&mut bytes, at).unwrap();
        bytes.truncate(length);
        file.write_all_at(&new[..length], at).unwrap();
        Original { file, at, bytes }
    }
}

impl Drop for Original {
    fn drop(&mut self) {
        self.file.write_all_at(&self.bytes, self.at).unwrap();
    }
}

/// Every truncation of the small file is refused, and looked into without harm.
#[test]
fn a_file_that_is_cut_off_anywhere_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = small(directory.path());
    let whole = std::fs::read(&path).unwrap();
    let tail = usize::try_from(Snapshot::open(&path).unwrap().tail().start.0).unwrap();
    let cuts = (0..300).chain((300..tail).step_by(40_009)).chain((tail - 100..whole.len()).step_by(7));
    for cut in cuts {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(cut as u64).unwrap();
        let error = Snapshot::open(&path).expect_err(&format!("cut at {cut}")).to_string();
        assert!(error.contains("offset") || cut < 8, "cut at {cut}: {error}");
        exercise(&path, true);
        file.write_all_at(&whole[cut..], cut as u64).unwrap();
    }
    assert!(Snapshot::open(&path).is_ok());
}

#[test]
fn any_byte_of_the_metadata_changed() {
    let directory = tempfile::tempdir().unwrap();
    for sample in mapped_samples()
        .iter()
        .filter(|sample| ["q11-pc-32-vga.mr", "q11-pc-32-ignore-shared-file.mr"].contains(&sample.name.as_str()))
    {
        let path = sample.unpack(directory.path()).unwrap();
        let areas = metadata(&Snapshot::open(&path).unwrap());
        let strategy = (
            prop::sample::select(areas),
            any::<prop::sample::Index>(),
            prop_oneof![
                prop::collection::vec(any::<u8>(), 1..9),
                prop::collection::vec(Just(0xff), 1..9),
                prop::collection::vec(Just(0), 1..9),
            ],
            any::<bool>(),
        );
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(400));
        runner
            .run(&strategy, |((start, length), index, new, damaged)| {
                let at = start + index.index(usize::try_from(length).unwrap()) as u64;
                let _original = Original::change(&path, at, &new);
                exercise(&path, damaged);
                Ok(())
            })
            .unwrap();
        assert!(Snapshot::open(&path).is_ok(), "the file is as it was");
    }
    // What a few bytes of a file can make this program use.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 512 << 10, "{peak} KiB were used at the peak");
}

/// Where the header of the first block of the small file is, and what is in it.
fn refused(change: impl Fn(u64) -> (u64, Vec<u8>), expected: &str) {
    let directory = tempfile::tempdir().unwrap();
    let path = small(directory.path());
    let header = Snapshot::open(&path).unwrap().block(BlockId(0)).unwrap().header_offset.0;
    let (at, new) = change(header);
    let _original = Original::change(&path, at, &new);
    let error = Snapshot::open(&path).expect_err(expected).to_string();
    assert!(error.contains(expected) && error.contains("0x"), "{error}");
    assert!(error.contains(&path.display().to_string()), "{error}");
}

#[test]
fn headers_that_can_not_be_right() {
    let word = |value: u64| value.to_be_bytes().to_vec();
    refused(|at| (at, vec![0, 0, 0, 2]), "version 2");
    refused(|at| (at, vec![0, 0, 0, 0]), "version 0");
    refused(|at| (at + 4, word(0)), "pages of 0 bytes");
    refused(|at| (at + 4, word(8192)), "pages of 8192 bytes");
    refused(|at| (at + 12, word(u64::MAX - 4)), "its bitmap");
    refused(|at| (at + 12, word(1 << 30)), "its bitmap");
    refused(|at| (at + 12, word(1 << 20)), "overlaps");
    refused(|at| (at + 20, word(4097)), "not a multiple");
    refused(|at| (at + 20, word(0)), "before its own header");
    refused(|at| (at + 20, word(!0xfff)), "beyond any file");
    refused(|at| (at + 20, word(1 << 40)), "it was truncated");
    refused(|at| (at - 8, word(0)), "empty");
    refused(|at| (at - 8, word(100 * PAGE_SIZE + 1)), "whole number");
    refused(|at| (at - 8, word(200 * PAGE_SIZE)), "lengths disagree");
    // The total in front of the first name, with the flag of the record.
    let name = "microvm.ram".len() as u64 + 1;
    refused(|at| (at - 8 - name - 8, word(!0xfff | 4)), "more than the limit");
    refused(|at| (at - 8 - name - 8, word((200 * PAGE_SIZE) | 4)), "lengths disagree");
    refused(|at| (at - 8 - name - 8, word((103 * PAGE_SIZE) | 8)), "list of blocks");
}

#[test]
fn bits_for_pages_that_do_not_exist() {
    let directory = tempfile::tempdir().unwrap();
    let path = small(directory.path());
    let bitmap = Snapshot::open(&path).unwrap().block(BlockId(0)).unwrap().bitmap_offset.0;
    // 100 pages: bit 104 is in byte 13.
    let _original = Original::change(&path, bitmap + 13, &[1]);
    let snapshot = Snapshot::open(&path).unwrap();
    let error = snapshot.load_run(BlockId(0), PageIndex(0), PageCount(1)).unwrap_err().to_string();
    assert!(error.contains("microvm.ram") && error.contains(&format!("{:#x}", bitmap + 13)), "{error}");
    assert!(snapshot.load_run(BlockId(1), PageIndex(0), PageCount(1)).is_ok());
    assert!(matches!(snapshot.diagnose().unwrap().as_slice(), [Warning::Bitmap { .. }]));
    assert!(snapshot.load_run(BlockId(0), PageIndex(100), PageCount(1)).is_err());
    assert!(snapshot.load_run(BlockId(9), PageIndex(0), PageCount(1)).is_err());
}

#[test]
fn what_follows_the_stream_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = small(directory.path());
    let end = Snapshot::open(&path).unwrap().tail().end;
    for more in [&[0; 3][..], &[0; 5000], b"text"] {
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(more, end.0).unwrap();
        let snapshot = Snapshot::open(&path).unwrap();
        let length = page_units::ByteLen::of(more.len());
        assert_eq!(snapshot.warnings(), [Warning::TrailingBytes { at: end, length }]);
        file.set_len(end.0).unwrap();
    }
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let error = Snapshot::open(directory.path()).unwrap_err();
    assert!(matches!(error.kind, OpenErrorKind::NotAFile), "{error}");
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let error = Snapshot::open(&pipe).unwrap_err();
    assert!(matches!(error.kind, OpenErrorKind::NotAFile), "{error}");
    let error = Snapshot::open(directory.path().join("nothing")).unwrap_err();
    assert!(matches!(error.kind, OpenErrorKind::Io(_)), "{error}");
}

#[test]
fn a_change_under_us_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let path = small(directory.path());
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.changed().unwrap(), None);
    OpenOptions::new().write(true).open(&path).unwrap().set_len(5000).unwrap();
    assert_eq!(snapshot.changed().unwrap(), Some("its size"));
    // A name that another file took does not concern us.
    let path = small(directory.path());
    let snapshot = Snapshot::open(&path).unwrap();
    let other = directory.path().join("other");
    std::fs::write(&other, "something else").unwrap();
    std::fs::rename(&other, &path).unwrap();
    assert!(snapshot.load_run(BlockId(0), PageIndex(0), PageCount(9)).is_ok());
}

#[test]
fn device_state_without_description_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = small(directory.path());
    let snapshot = Snapshot::open(&path).unwrap();
    let devices = snapshot.device_state();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(devices.end.0 + 1).unwrap();
    // It may have been cut at a byte that happens to be zero: not to be loaded.
    let error = Snapshot::open(&path).unwrap_err();
    assert!(matches!(error.kind, OpenErrorKind::NoDescription { .. }), "{error}");
    let look = Snapshot::open_with(&path, &Options::default().with_damaged(true)).unwrap();
    assert_eq!(look.device_state(), devices);
    assert_eq!(look.warnings(), [Warning::NoDescription]);
    assert!(!look.is_complete());
}

#[test]
fn an_empty_configuration_is_no_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let writer = Writer::create(&path, &Configuration::new("m"), Layout::default()).unwrap();
    assert!(writer.finish(&[0]).is_err(), "a snapshot without RAM");
    assert!(!path.exists());
}
