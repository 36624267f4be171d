//! What the fuzz targets run. Each function takes any bytes and must neither panic, nor hang, nor use much memory.

use std::io::Cursor;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use mapped_ram::{Options, Snapshot};
use page_units::{ByteLen, FileOffset, PageIndex};
use vmstate::ram::{Record, RecordReader, RecordWriter};
use vmstate::{Event, SectionKind, StreamError, StreamReader, StreamWriter, VmDesc, find_vmdesc, walk};

pub mod seeds;

/// Where the second part of a [`snapshot`] input begins in the file: behind the pages of its one block.
pub const SECOND_PART: u64 = (1 << 20) + 16 * 4096;

/// Fills the corpus directory, libFuzzer's first argument, if it is empty.
pub fn seed(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    let Some(directory) = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).map(PathBuf::from)
    else {
        return;
    };
    if directory.is_file() {
        return;
    }
    std::fs::create_dir_all(&directory).expect("a corpus directory");
    if std::fs::read_dir(&directory).expect("a corpus directory").next().is_none() {
        for (number, bytes) in seeds().into_iter().enumerate() {
            std::fs::write(directory.join(format!("seed-{number}")), bytes).expect("writing a seed");
        }
    }
}

/// Splits off what a two-byte length in front announces.
fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))
}

/// A mapped-ram file. Its first part is at the beginning of the file, its second behind the pages.
pub fn snapshot(data: &[u8]) {
    let Some((head, tail)) = split(data) else { return };
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.as_file().write_all_at(head, 0).expect("writing");
    file.as_file().write_all_at(tail, SECOND_PART).expect("writing");
    for damaged in [false, true] {
        let Ok(snapshot) = Snapshot::open_with(file.path(), &Options::default().with_damaged(damaged)) else {
            continue;
        };
        for (block, ram) in snapshot.layout().iter() {
            let mut page = PageIndex(0);
            while page.0 < ram.pages().0 {
                let Ok(found) = snapshot.load_run(block, page, ram.pages()) else { break };
                let run = found.pages();
                assert!(run.0 > 0 && page.0 + run.0 <= ram.pages().0);
                assert_eq!(snapshot.known_run(block, page, ram.pages()), Some(found));
                page += run;
            }
            let _ = snapshot.stored_pages(block);
        }
        for entry in snapshot.sections().iter().filter(|entry| entry.kind == SectionKind::Full) {
            assert!(entry.range.start <= entry.body.start && entry.body.end <= entry.range.end);
            let Ok(Some(device)) = snapshot.device(&entry.name, entry.instance) else { continue };
            let Ok(value) = device.decode() else { continue };
            let mut again = Vec::new();
            value.encode(&mut again);
            assert_eq!(again, device.body());
        }
        let warnings = snapshot.diagnose().expect("a file that can be read");
        assert!(damaged || snapshot.is_complete());
        assert!(warnings.iter().all(|warning| !warning.to_string().contains('\n')));
        snapshot.read(snapshot.tail()).expect("the tail is in the file");
    }
}

/// A description (two bytes of length in front) and a section's body.
pub fn vmdesc(data: &[u8]) {
    let Some((text, body)) = split(data) else { return };
    let Ok(vmdesc) = VmDesc::parse(text) else { return };
    for device in vmdesc.devices() {
        let length = device.body_len();
        if let Ok(value) = walk(body, FileOffset(7), device) {
            assert_eq!(length, Some(ByteLen::of(body.len())));
            let mut again = Vec::new();
            value.encode(&mut again);
            assert_eq!(again, body);
        }
    }
}

/// A plain stream.
pub fn stream(data: &[u8]) {
    let end = FileOffset(data.len() as u64);
    let text = find_vmdesc(&mut Cursor::new(data), FileOffset(0)..end).expect("memory can be read");
    let vmdesc = text.and_then(|text| VmDesc::parse(&text.value).ok());
    let mut from = StreamReader::new(data, FileOffset(0));
    let mut to = StreamWriter::new(Vec::new());
    if copy(&mut from, &mut to, vmdesc.as_ref()).is_ok() {
        let length = usize::try_from(from.position().0).expect("a position in memory");
        assert_eq!(to.into_inner(), data[..length]);
    }
}

fn copy(
    from: &mut StreamReader<&[u8]>,
    to: &mut StreamWriter<Vec<u8>>,
    vmdesc: Option<&VmDesc>,
) -> Result<(), StreamError> {
    let stop = |at| StreamError::Invalid { at, what: "cannot go on".to_owned() };
    let (mut records, mut again) = (RecordReader::new(), RecordWriter::new());
    while let Some(event) = from.next_event()? {
        to.event(&event.value).expect("what was read can be written");
        let at = event.range.start;
        match event.value {
            Event::Command(command) => {
                if let Ok(meaning) = command.decode(at) {
                    assert_eq!(meaning.encode().expect("what was decoded can be encoded"), command);
                }
            }
            Event::SectionStart(_) | Event::SectionPart { .. } | Event::SectionEnd { .. } => loop {
                let record = records.next(from)?;
                again.copy(to, record, records.block().unwrap_or_default()).expect("what was read can be written");
                let follows = match record {
                    Record::EndOfSection => break,
                    Record::Page { .. } => 4096,
                    Record::Xbzrle { length, .. } => length.into(),
                    _ => 0,
                };
                to.bytes(&from.read_vec(ByteLen(follows), ByteLen(1 << 16))?).expect("memory");
            },
            Event::SectionFull(header) => {
                let desc = vmdesc.and_then(|vmdesc| vmdesc.device(&header.name, header.instance));
                let length = desc.and_then(|desc| desc.body_len()).ok_or_else(|| stop(at))?;
                to.bytes(&from.read_vec(length, ByteLen(1 << 20))?).expect("memory");
            }
            _ => {}
        }
    }
    Ok(())
}
