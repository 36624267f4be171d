//! What the writer writes is what the reader reads.

mod common;

use std::sync::Mutex;

use common::{mapped_samples, open};
use mapped_ram::{CreateError, FileRun, Snapshot, Writer};
use page_units::{BlockId, ByteLen, Layout, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSize, RamBlock};
use proptest::prelude::*;
use vmstate::{Configuration, ConfigurationSubsection, DeviceWriter, Section};

fn layout(blocks: &[(&str, u64)]) -> Layout {
    let ram =
        |(name, pages): &(&str, u64)| RamBlock::new(*name, PageCount(*pages).to_bytes(), PageSize::SMALL).unwrap();
    Layout::new(blocks.iter().map(ram).collect()).unwrap()
}

fn device_state() -> Vec<u8> {
    let mut devices = DeviceWriter::new(2);
    devices.push(Section::builder("example", 0, 1).u64("counter", 42).buffer("bytes", b"abc").build().unwrap());
    devices.finish("example-machine").unwrap()
}

/// Reads a block's content through the library.
fn content(snapshot: &Snapshot, block: BlockId) -> Vec<u8> {
    let pages = snapshot.layout().get(block).unwrap().pages();
    let mut all = Vec::new();
    let mut page = PageIndex(0);
    while page.0 < pages.0 {
        let found = snapshot.load_run(block, page, pages).unwrap();
        let run = found.pages();
        assert!(run.0 > 0);
        let at = snapshot.page_offset(block, page).unwrap();
        match found.is_stored() {
            true => all.extend(snapshot.read(at..at + run.to_bytes()).unwrap()),
            false => all.resize(all.len() + run.to_bytes().get(), 0),
        }
        page += run;
    }
    all
}

/// One step of a thread: a run of a block, stored with a pattern or zero.
type Step = (u8, u64, u64, Option<u8>);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Several threads write runs; each owns the pages whose number is its own modulo the number of threads, so that
    /// the oracle knows the order.
    #[test]
    fn equals_the_oracle(
        lengths in prop::collection::vec(1u64..400, 1..4),
        steps in prop::collection::vec((any::<u8>(), any::<u64>(), 1u64..9, prop::option::of(any::<u8>())), 0..200),
        threads in 1u64..5,
    ) {
        let names = ["ram", "rom", "vram"];
        let blocks: Vec<(&str, u64)> = names.into_iter().zip(lengths.iter().copied()).collect();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("snapshot");
        let writer = Writer::create(&path, &Configuration::new("example-machine"), layout(&blocks)).unwrap();
        let oracle: Vec<Mutex<Vec<u8>>> =
            lengths.iter().map(|pages| Mutex::new(vec![0; PageCount(*pages).to_bytes().get()])).collect();
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (writer, oracle, steps, lengths) = (&writer, &oracle, &steps, &lengths);
                scope.spawn(move || steps.iter().for_each(|step| apply(writer, oracle, lengths, *step, thread, threads)));
            }
        });
        prop_assert!(!path.exists());
        writer.finish(&device_state()).unwrap();

        let snapshot = Snapshot::open(&path).unwrap();
        prop_assert_eq!(snapshot.layout(), &layout(&blocks));
        for (id, _) in snapshot.layout().iter() {
            prop_assert!(content(&snapshot, id) == *oracle[id.0 as usize].lock().unwrap());
            prop_assert_eq!(snapshot.stored_pages(id).unwrap(), writer.stored_pages(id));
        }
        let device = snapshot.device("example", 0).unwrap().unwrap();
        prop_assert_eq!(device.decode().unwrap().field("counter").unwrap().as_u64(), Ok(42));
        prop_assert_eq!(snapshot.warnings(), []);
    }
}

fn apply(writer: &Writer, oracle: &[Mutex<Vec<u8>>], lengths: &[u64], step: Step, thread: u64, threads: u64) {
    let (block, first, pages, fill) = step;
    let number = usize::from(block) % lengths.len();
    let block = BlockId(u32::try_from(number).unwrap());
    let first = first % lengths[number];
    let pages = pages.min(lengths[number] - first);
    for page in (first..first + pages).filter(|page| page % threads == thread) {
        let run = PageRun::single(block, PageIndex(page));
        let bytes = vec![fill.unwrap_or(0); 4096];
        match fill {
            Some(_) => writer.write(run, &bytes).unwrap(),
            None => writer.mark_zero(run),
        }
        let at = run.first.byte_offset().get();
        oracle[number].lock().unwrap()[at..at + bytes.len()].copy_from_slice(&bytes);
    }
}

#[test]
fn long_runs_are_marked_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", 1000)])).unwrap();
    writer.mark_stored(PageRun::new(BlockId(0), PageIndex(3), PageCount(900)));
    writer.mark_zero(PageRun::new(BlockId(0), PageIndex(64), PageCount(64)));
    assert_eq!(writer.stored_pages(BlockId(0)), PageCount(900 - 64));
    // What does not exist is not there.
    let beyond = PageRun::new(BlockId(0), PageIndex(999), PageCount(2));
    assert_eq!(writer.data_offset(beyond), None);
    assert!(writer.write(beyond, &[0; 8192]).is_err());
    writer.mark_stored(beyond);
    assert_eq!(writer.stored_pages(BlockId(0)), PageCount(900 - 64));
}

#[test]
fn what_is_not_finished_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    std::fs::write(&path, "what was there before").unwrap();
    let empty = || std::fs::read_dir(directory.path()).unwrap().count() == 1;

    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", 10)])).unwrap();
    writer.write(PageRun::single(BlockId(0), PageIndex(0)), &[1; 4096]).unwrap();
    drop(writer);
    assert!(empty());

    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", 10)])).unwrap();
    assert!(matches!(writer.finish(b"no device state"), Err(CreateError::Unreadable(_))));
    assert!(matches!(writer.finish(&device_state()), Err(CreateError::Finished { .. })));
    assert!(empty());
    assert_eq!(std::fs::read(&path).unwrap(), b"what was there before");

    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", 10)])).unwrap();
    writer.finish(&device_state()).unwrap();
    assert!(empty());
    assert_eq!(Snapshot::open(&path).unwrap().configuration().machine, "m");
}

#[test]
fn copies_of_the_samples_have_the_same_ram_and_devices() {
    let directory = tempfile::tempdir().unwrap();
    for sample in mapped_samples() {
        let (_unpacked, _, from) = open(&sample);
        if from.lacks_bitmaps() || from.layout().iter().any(|(id, _)| !from.block(id).unwrap().in_file) {
            continue;
        }
        let path = directory.path().join("copy");
        let writer = Writer::create(&path, from.configuration(), from.layout().clone()).unwrap();
        for (id, ram) in from.layout().iter() {
            let mut rest = PageRun::new(id, PageIndex(0), ram.pages());
            while !rest.is_empty() {
                let found = from.load_run(id, rest.first, rest.pages).unwrap();
                let (run, later) = rest.split_at(found.pages());
                if found.is_stored() {
                    let at = from.page_offset(id, run.first).unwrap();
                    writer.write(run, &from.read(at..at + run.len()).unwrap()).unwrap();
                }
                rest = later;
            }
        }
        writer.finish(&from.read(from.tail()).unwrap()).unwrap();

        let copy = Snapshot::open(&path).unwrap();
        assert_eq!(copy.configuration(), from.configuration(), "{}", sample.name);
        assert_eq!(copy.read(copy.tail()).unwrap(), from.read(from.tail()).unwrap(), "{}", sample.name);
        for (id, ram) in from.layout().iter() {
            assert!(content(&copy, id) == content(&from, id), "{} {}", sample.name, ram.name());
            if from.base().0 == 0 {
                assert_eq!(copy.block(id).unwrap().pages_offset, from.block(id).unwrap().pages_offset, "QEMU's layout");
            }
        }
    }
}

#[test]
fn the_configuration_says_what_the_file_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let mut configuration = Configuration::new("m");
    configuration.subsections.push(ConfigurationSubsection::Uuid([7; 16]));
    configuration.subsections.push(ConfigurationSubsection::Capabilities(vec!["x-ignore-shared".into()]));
    let writer = Writer::create(&path, &configuration, layout(&[("ram", 1)])).unwrap();
    writer.finish(&device_state()).unwrap();
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.configuration().capabilities().collect::<Vec<_>>(), ["mapped-ram"]);
    assert_eq!(snapshot.configuration().uuid(), Some([7; 16]));
    assert_eq!(snapshot.layout().total(), ByteLen(4096));
}

#[test]
fn zero_pages_are_holes_and_cost_nothing() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let pages = PageCount((16 << 30) / PAGE_SIZE);
    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", pages.0)])).unwrap();
    writer.finish(&device_state()).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.len() > 16 << 30);
    assert!(metadata.blocks() * 512 < 2 << 20, "{} bytes on disk", metadata.blocks() * 512);
    let snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.load_run(BlockId(0), PageIndex(0), pages).unwrap(), FileRun::Zero(pages));
    assert_eq!(snapshot.known_run(BlockId(0), PageIndex(5), pages), Some(FileRun::Zero(PageCount(pages.0 - 5))));
}

#[test]
fn terabytes_that_are_zero_cost_nothing() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    // As much as fits into a file of ext4, whose end is at 16 TiB; the bitmap alone would be 511 MiB.
    let pages = PageCount(((16 << 40) - (1 << 30)) / PAGE_SIZE);
    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", pages.0)])).unwrap();
    let stored = [0, 1, 63, 64, (1 << 15) - 1, 1 << 15, 1 << 31, pages.0 - 1];
    for page in stored {
        let fill = u8::try_from(page % 251).unwrap() + 1;
        writer.write(PageRun::single(BlockId(0), PageIndex(page)), &[fill; 4096]).unwrap();
    }
    writer.mark_zero(PageRun::new(BlockId(0), PageIndex(1 << 31), PageCount(1)));
    writer.finish(&device_state()).unwrap();

    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.blocks() * 512 < 1 << 20, "{} bytes on disk", metadata.blocks() * 512);
    let snapshot = Snapshot::open(&path).unwrap();
    let mut found = Vec::new();
    let mut rest = PageRun::new(BlockId(0), PageIndex(0), pages);
    while !rest.is_empty() {
        let found_run = snapshot.load_run(BlockId(0), rest.first, rest.pages).unwrap();
        let (run, later) = rest.split_at(found_run.pages());
        if found_run.is_stored() {
            found.extend(run.first.0..run.first.0 + run.pages.0);
        }
        rest = later;
    }
    let expected: Vec<u64> = stored.into_iter().filter(|page| *page != 1 << 31).collect();
    assert_eq!(found, expected);
    for page in found {
        let at = snapshot.page_offset(BlockId(0), PageIndex(page)).unwrap();
        let fill = u8::try_from(page % 251).unwrap() + 1;
        assert!(snapshot.read(at..at + ByteLen(4096)).unwrap() == [fill; 4096], "{page}");
    }
}

#[test]
fn errors_tell_where_in_the_file() {
    use std::os::unix::fs::FileExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let writer = Writer::create(&path, &Configuration::new("m"), layout(&[("ram", 1)])).unwrap();
    writer.finish(&device_state()).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    // The text is all that is behind the last zero, but for the rest of its length.
    let text = bytes.iter().rposition(|byte| *byte == 0).unwrap();
    let text = text + bytes[text..].iter().position(|byte| *byte == b'{').unwrap();
    file.write_all_at(b"{!", text as u64).unwrap();
    let error = Snapshot::open(&path).unwrap_err().to_string();
    assert!(error.contains(&format!("begins at offset {text:#x})")), "{error}");
    file.write_all_at(b"{\"", text as u64).unwrap();
    file.write_all_at(&[0, 0, 0, 9], 4).unwrap();
    let error = Snapshot::open(&path).unwrap_err().to_string();
    assert!(error.contains("at offset 0x4: version 9"), "{error}");
}
