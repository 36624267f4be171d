//! A list of RAM blocks that is shorter or longer than it says: where it is seen, strictly and with a look at the rest.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use mapped_ram::{OpenErrorKind, Options, Snapshot, Warning, Writer};
use page_units::{BlockId, ByteLen, FileOffset, Layout, PAGE_SIZE, PageCount, PageSize, RamBlock};
use vmstate::{Configuration, DeviceWriter, Section};

/// A file of two blocks, of 10 and of 3 pages.
fn file(path: &Path) -> File {
    let ram = |name: &str, pages| RamBlock::new(name, PageCount(pages).to_bytes(), PageSize::SMALL).unwrap();
    let layout = Layout::new(vec![ram("ram", 10), ram("rom", 3)]).unwrap();
    let mut devices = DeviceWriter::new(2);
    devices.push(Section::builder("example", 0, 1).u64("counter", 42).build().unwrap());
    let writer = Writer::create(path, &Configuration::new("m"), layout).unwrap();
    writer.finish(&devices.finish("m").unwrap()).unwrap();
    OpenOptions::new().write(true).open(path).unwrap()
}

#[test]
fn both_tell_the_offset_and_the_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let file = file(&path);
    let whole = Snapshot::open(&path).unwrap();
    let block = |number| whole.block(BlockId(number)).unwrap();
    // An entry is a counted name, 8 bytes of length, and the header; the announced length is in front of the first.
    let entry = |number| FileOffset(block(number).header_offset.0 - 8 - 4);
    let end = block(1).pages_offset + PageCount(3).to_bytes();
    assert_eq!(entry(1), block(0).pages_offset + PageCount(10).to_bytes());
    let length = |pages: u64| ByteLen(pages * PAGE_SIZE);
    for (announced, at, sum) in [(20, end, 13), (11, entry(1), 13), (9, entry(0), 10)] {
        // The flag of the record that announces a length (QEMU `migration/ram.c`, `RAM_SAVE_FLAG_MEM_SIZE`).
        let total = length(announced).0 | 4;
        file.write_all_at(&total.to_be_bytes(), entry(0).0 - 8).unwrap();
        let (total, sum) = (length(announced), length(sum));
        let error = Snapshot::open(&path).unwrap_err();
        let expected = matches!(&error.kind, OpenErrorKind::RamLength { at: a, total: t, sum: s } if (*a, *t, *s) == (at, total, sum));
        assert!(expected, "{announced} pages: {error}");
        assert!(error.to_string().contains(&format!("at offset {at}: lengths disagree")), "{error}");

        let damaged = Options::default().with_damaged(true);
        let Ok(look) = Snapshot::open_with(&path, &damaged) else {
            assert_eq!(at, entry(0), "not even the first block is there");
            continue;
        };
        let warning = Warning::RamLengthDisagrees { at, total, sum };
        assert_eq!(look.warnings().first(), Some(&warning), "{announced} pages");
        assert!(warning.to_string().contains(&format!("at offset {at}: lengths disagree")), "{warning}");
        // What is announced too long is followed by the rest as ever.
        assert_eq!(look.is_complete(), announced == 20);
    }
}
