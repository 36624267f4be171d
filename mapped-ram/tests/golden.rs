//! Every fact that is known about the sample files.

mod common;

use common::{mapped_samples, open, samples, sha256};
use mapped_ram::{OpenErrorKind, Options, Snapshot, Warning};
use page_units::{BlockId, FileOffset, PageCount, PageIndex};
use serde_json::{Value, json};
use vmstate::{Event, GlobalState, SectionKind, StreamReader, StreamWriter};

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// The content of a block as a guest would see it: stored pages from the file, zeros elsewhere.
fn ram_of(snapshot: &Snapshot, bytes: &[u8], id: BlockId) -> Vec<u8> {
    let ram = snapshot.layout().get(id).unwrap();
    let mut content = vec![0; ram.length().get()];
    let mut page = PageIndex(0);
    while page.0 < ram.pages().0 {
        // The repair of QEMU's empty bitmaps is not done here: such a file has no content.
        let Ok(found) = snapshot.load_run(id, page, PageCount(1 << 20)) else { return content };
        let run = found.pages();
        assert_eq!(snapshot.known_run(id, page, PageCount(1 << 20)), Some(found));
        for most in [PageCount(1), PageCount(100), PageCount(1 << 40)] {
            let known = snapshot.known_run(id, page, most).unwrap();
            assert_eq!((known.is_stored(), known.pages().min(run)), (found.is_stored(), run.min(most)));
        }
        if found.is_stored() {
            let from = usize::try_from(snapshot.page_offset(id, page).unwrap().0).unwrap();
            let to = usize::try_from(page.byte_offset().0).unwrap();
            let length = run.to_bytes().get();
            content[to..to + length].copy_from_slice(&bytes[from..from + length]);
        }
        page += run;
    }
    content
}

#[test]
fn all_facts_of_all_files() {
    let mut files = 0;
    for sample in mapped_samples() {
        let (_directory, path, snapshot) = open(&sample);
        let (name, golden) = (&sample.name, &sample.golden);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, number(&golden["size"]), "{name}");
        assert_eq!(json!(sha256(&bytes)), golden["sha256"], "{name}");

        assert_eq!(snapshot.base().0, number(&golden["base"]), "{name}");
        assert_eq!(json!(snapshot.configuration().machine), golden["machine"], "{name}");
        assert_eq!(json!(snapshot.configuration().capabilities().collect::<Vec<_>>()), golden["caps"], "{name}");
        assert_eq!(snapshot.layout().total().0, number(&golden["total_ram"]), "{name}");
        assert_eq!(snapshot.device_state().end.0, number(&golden["eof"]), "{name}");
        assert_eq!(snapshot.tail().end.0, number(&golden["end"]), "{name}");

        let blocks = golden["blocks"].as_array().unwrap();
        assert_eq!(snapshot.layout().blocks().len(), blocks.len(), "{name}");
        for ((id, ram), golden) in snapshot.layout().iter().zip(blocks) {
            let file = snapshot.block(id).unwrap();
            assert_eq!(json!(ram.name()), golden["id"], "{name}");
            let what = format!("{name} {}", ram.name());
            assert_eq!(ram.length().0, number(&golden["len"]), "{what}");
            assert_eq!(number(&golden["page_size"]), 4096, "{what}");
            assert_eq!(file.header_offset.0, number(&golden["hdr"]), "{what}");
            assert_eq!(file.bitmap_offset.0, number(&golden["bitmap_offset"]), "{what}");
            assert_eq!(file.bitmap_len.0, number(&golden["bitmap_len"]), "{what}");
            assert_eq!(file.pages_offset.0, number(&golden["pages_offset"]), "{what}");
            assert_eq!(file.in_file, file.bitmap_len.0 > 0, "{what}");
            assert_eq!(snapshot.stored_pages(id).unwrap().0, number(&golden["pages_set"]), "{what}");
            let at = usize::try_from(file.bitmap_offset.0).unwrap();
            assert_eq!(json!(sha256(&bytes[at..at + file.bitmap_len.get()])), golden["bitmap_sha256"], "{what}");
            if file.in_file && !snapshot.lacks_bitmaps() {
                assert_eq!(json!(sha256(&ram_of(&snapshot, &bytes, id))), golden["ram_sha256"], "{what}");
            }
        }

        let sections: Vec<Value> = snapshot
            .sections()
            .iter()
            .map(|entry| match entry.kind {
                SectionKind::Command => {
                    json!([entry.kind.to_string(), entry.id, entry.name, entry.range.start.0, entry.range.end.0])
                }
                kind => json!([
                    kind.to_string(),
                    entry.id,
                    entry.name,
                    entry.instance,
                    entry.version,
                    entry.range.start.0,
                    entry.range.end.0
                ]),
            })
            .collect();
        assert_eq!(Value::Array(sections), golden["sections"], "{name}");
        files += 1;
    }
    assert!(files >= 14);
}

#[test]
fn every_device_is_decoded_to_its_last_byte() {
    for sample in mapped_samples() {
        let (_directory, _, snapshot) = open(&sample);
        let mut at = snapshot.device_state().start;
        for entry in snapshot.sections().iter().filter(|entry| entry.kind == SectionKind::Full) {
            assert_eq!(entry.range.start, at, "{} {}", sample.name, entry.name);
            at = entry.range.end;
            let device = snapshot.device(&entry.name, entry.instance).unwrap().unwrap();
            let value = device.decode().unwrap();
            let mut again = Vec::new();
            value.encode(&mut again);
            assert_eq!(again, device.body(), "{} {}", sample.name, entry.name);
            assert_eq!(value.range, entry.body);
        }
        assert_eq!(at, snapshot.device_state().end, "{}", sample.name);

        let device = snapshot.device(GlobalState::SECTION, 0).unwrap().unwrap();
        let state = GlobalState::from_value(&device.decode().unwrap()).unwrap();
        let expected = if sample.name.contains("paused") { "paused" } else { "running" };
        assert_eq!(state.runstate, expected, "{}", sample.name);
    }
}

#[test]
fn only_qemus_empty_bitmaps_are_warned_of() {
    for sample in mapped_samples() {
        let (_directory, _, snapshot) = open(&sample);
        let warnings = snapshot.diagnose().unwrap();
        if !sample.name.contains("bgmr") {
            assert_eq!(warnings, [], "{}", sample.name);
            continue;
        }
        assert_eq!(snapshot.warnings(), [Warning::BitmapsNotWritten], "{}", sample.name);
        assert!(matches!(warnings.as_slice(), [Warning::BitmapsAllZero { .. }]), "{}: {warnings:?}", sample.name);
        // No page of it is given out as zero.
        let error = snapshot.load_run(BlockId(0), PageIndex(0), PageCount(1)).unwrap_err();
        assert!(error.to_string().contains("background-snapshot"), "{error}");
        assert_eq!(snapshot.known_run(BlockId(0), PageIndex(0), PageCount(1)), None);
    }
}

#[test]
fn memory_that_was_left_out_is_not_zero() {
    let all = mapped_samples();
    let sample = all.iter().find(|sample| sample.name.contains("ignore-shared")).unwrap();
    let (_directory, _, snapshot) = open(sample);
    assert!(!snapshot.block(BlockId(0)).unwrap().in_file);
    assert!(snapshot.load_run(BlockId(0), PageIndex(0), PageCount(1)).is_err());
    assert_eq!(snapshot.known_run(BlockId(0), PageIndex(0), PageCount(1)), None);
    assert_eq!(snapshot.page_offset(BlockId(0), PageIndex(0)), None);
}

#[test]
fn a_stream_behind_a_foreign_header_is_where_it_is_said_to_be() {
    let all = mapped_samples();
    let sample = all.iter().find(|sample| sample.name.contains("offset-unaligned")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let path = sample.unpack(directory.path()).unwrap();
    let options = |base| Options::default().with_base(FileOffset(base));
    assert_eq!(Snapshot::open_with(&path, &options(0x1234)).unwrap().base(), FileOffset(0x1234));
    let error = Snapshot::open_with(&path, &options(0)).unwrap_err();
    assert!(matches!(error.kind, OpenErrorKind::NotAStream { base: FileOffset(0), searched: false }), "{error}");
    // Behind more than is searched: the message says how far that was.
    let mut far = vec![0; 2 << 20];
    far.extend(std::fs::read(&path).unwrap());
    std::fs::write(&path, far).unwrap();
    let error = Snapshot::open(&path).unwrap_err().to_string();
    assert!(error.ends_with("(no \"QEVM\" at offset 0x0, nor farther on in the first MiB)"), "{error}");
}

#[test]
fn plain_streams_are_named_as_such() {
    let directory = tempfile::tempdir().unwrap();
    for sample in samples::full().iter().filter(|sample| !sample.is_mapped_ram()) {
        let path = sample.unpack(directory.path()).unwrap();
        let error = Snapshot::open(&path).unwrap_err();
        assert!(matches!(error.kind, OpenErrorKind::PlainStream { .. }), "{error}");
        assert!(error.to_string().contains(&sample.name), "{error}");
    }
    // One of our own, so that there always is one.
    let path = directory.path().join("plain");
    let mut out = vmstate::StreamWriter::new(Vec::new());
    out.event(&vmstate::Event::Header).unwrap();
    out.event(&vmstate::Event::Configuration(vmstate::Configuration::new("pc-i440fx-10.0"))).unwrap();
    out.event(&vmstate::Event::Eof).unwrap();
    std::fs::write(&path, out.into_inner()).unwrap();
    let error = Snapshot::open(&path).unwrap_err().to_string();
    assert!(error.contains("plain migration stream") && error.contains("pc-i440fx-10.0"), "{error}");
}

/// The framing of every file, taken apart and written again: the same bytes.
#[test]
fn every_file_comes_out_as_it_went_in() {
    for sample in mapped_samples() {
        let (_directory, path, snapshot) = open(&sample);
        let bytes = std::fs::read(&path).unwrap();
        let base = usize::try_from(snapshot.base().0).unwrap();
        let mut from = StreamReader::new(&bytes[base..], snapshot.base());
        let mut to = StreamWriter::new(Vec::new());
        let mut bodies = snapshot.sections().iter().filter(|entry| entry.kind != SectionKind::Command);
        while let Some(event) = from.next_event().unwrap() {
            to.event(&event.value).unwrap();
            if matches!(
                event.value,
                Event::SectionStart(_) | Event::SectionPart { .. } | Event::SectionEnd { .. } | Event::SectionFull(_)
            ) {
                let entry = bodies.next().unwrap();
                assert_eq!(event.range, entry.range.start..entry.body.start);
                let length = entry.body.end - entry.body.start;
                to.bytes(&from.read_vec(length, length).unwrap()).unwrap();
            }
        }
        assert!(to.into_inner() == bytes[base..], "{}", sample.name);
    }
}
