//! Whole streams, read and written again.

#![expect(unreachable_pub, dead_code, reason = "the samples module is shared with other tests")]

#[path = "../../testkit/src/samples.rs"]
mod samples;

use std::io::{Cursor, Read, Write};
use std::os::unix::net::UnixStream;

use page_units::{ByteLen, FileOffset};
use proptest::prelude::*;
use vmstate::ram::{Record, RecordReader, RecordWriter};
use vmstate::{
    Command, Configuration, ConfigurationSubsection, DeviceWriter, Event, Section, SectionHeader, StreamError,
    StreamReader, StreamWriter, VmDesc, WriteError, find_vmdesc, walk,
};

/// Reads a plain stream and writes it again, part by part. `vmdesc` tells how long the devices' sections are.
fn copy<R: Read>(from: R, vmdesc: &VmDesc, to: impl Write) -> Result<u64, StreamError> {
    let written = |_: WriteError| StreamError::Version { at: FileOffset(4), version: 0 };
    let mut from = StreamReader::new(from, FileOffset(0));
    let mut to = StreamWriter::new(to);
    let (mut records, mut again) = (RecordReader::new(), RecordWriter::new());
    let mut pages = 0;
    while let Some(event) = from.next_event()? {
        to.event(&event.value).map_err(written)?;
        match event.value {
            Event::SectionStart(_) | Event::SectionPart { .. } | Event::SectionEnd { .. } => loop {
                let record = records.next(&mut from)?;
                again.copy(&mut to, record, records.block().unwrap_or_default()).map_err(written)?;
                match record {
                    Record::EndOfSection => break,
                    Record::MemSize { total } => {
                        let mut sum = 0;
                        while sum < total.0 {
                            let (name, length) = (from.counted_string()?, from.u64()?);
                            to.counted_string(&name).map_err(written)?;
                            to.u64(length).map_err(written)?;
                            sum = u64::saturating_add(sum, length);
                        }
                    }
                    Record::Page { .. } => {
                        pages += 1;
                        let page = from.read_vec(ByteLen(4096), ByteLen(4096))?;
                        to.bytes(&page).map_err(written)?;
                    }
                    Record::Zero { .. } => pages += 1,
                    _ => {}
                }
            },
            Event::SectionFull(header) => {
                let at = from.position();
                let invalid = |what: String| StreamError::Invalid { at, what };
                let desc = vmdesc.device(&header.name, header.instance).ok_or_else(|| invalid(header.name.clone()))?;
                let body = from.read_vec(desc.body_len().unwrap(), ByteLen(1 << 24))?;
                let value = walk(&body, at, desc).map_err(|error| invalid(error.to_string()))?;
                let mut bytes = Vec::new();
                value.encode(&mut bytes);
                to.bytes(&bytes).map_err(written)?;
            }
            _ => {}
        }
    }
    Ok(pages)
}

/// A small plain stream of our own, with everything that QEMU puts into one.
fn small() -> Vec<u8> {
    let mut out = StreamWriter::new(Vec::new());
    let mut configuration = Configuration::new("pc-i440fx-10.0");
    configuration.subsections.push(ConfigurationSubsection::TargetPageBits(12));
    configuration.subsections.push(ConfigurationSubsection::Capabilities(vec!["x-ignore-shared".into()]));
    configuration.subsections.push(ConfigurationSubsection::Uuid(*b"0123456789abcdef"));
    out.event(&Event::Header).unwrap();
    out.event(&Event::Configuration(configuration)).unwrap();
    out.command(&Command::OpenReturnPath).unwrap();
    out.command(&Command::Ping(1)).unwrap();
    out.event(&Event::SectionStart(SectionHeader { id: 2, name: "ram".into(), instance: 0, version: 4 })).unwrap();
    let mut records = RecordWriter::new();
    records.mem_size(&mut out, ByteLen(12288)).unwrap();
    for (name, length) in [("pc.ram", 8192), ("pc.bios", 4096)] {
        out.counted_string(name).unwrap();
        out.u64(length).unwrap();
    }
    records.end(&mut out).unwrap();
    out.event(&Event::Footer { id: 2 }).unwrap();
    out.event(&Event::SectionPart { id: 2 }).unwrap();
    records.page(&mut out, "pc.ram", ByteLen(0)).unwrap();
    out.bytes(&[7; 4096]).unwrap();
    records.zero(&mut out, "pc.ram", ByteLen(4096)).unwrap();
    records.zero(&mut out, "pc.bios", ByteLen(0)).unwrap();
    records.end(&mut out).unwrap();
    out.event(&Event::Footer { id: 2 }).unwrap();
    out.command(&Command::SwitchoverStart).unwrap();
    out.event(&Event::SectionEnd { id: 2 }).unwrap();
    records.end(&mut out).unwrap();
    out.event(&Event::Footer { id: 2 }).unwrap();
    let mut devices = DeviceWriter::new(3);
    devices.push(
        Section::builder("cpu", 0, 1)
            .u64s("regs", &[1, 2, 3])
            .structures("segment", "segment", 1, [5u16, 6], |one, selector| one.u16("selector", selector))
            .structures("flag", "flag", 1, 0..3, |one, flags| {
                (0..flags.min(1)).fold(one, |one, _| one.bool("set", true))
            })
            .subsection("cpu/nmi", 2, |nmi| nmi.bool("pending", true).i32("level", -3))
            .build()
            .unwrap(),
    );
    devices.push(Section::builder("cpu", 1, 1).buffer("raw", &[9; 33]).build().unwrap());
    out.bytes(&devices.finish("pc-i440fx-10.0").unwrap()).unwrap();
    out.into_inner()
}

fn vmdesc_of(bytes: &[u8]) -> VmDesc {
    let end = FileOffset(bytes.len() as u64);
    let text = find_vmdesc(&mut Cursor::new(bytes), FileOffset(0)..end).unwrap().unwrap();
    assert_eq!(text.range.end, end);
    VmDesc::parse(&text.value).unwrap()
}

#[test]
fn plain_streams_come_out_as_they_went_in() {
    let real =
        samples::full().into_iter().filter(|sample| !sample.is_mapped_ram()).map(|sample| sample.bytes().unwrap());
    for bytes in real.chain([small()]) {
        let vmdesc = vmdesc_of(&bytes);
        let mut again = Vec::new();
        let pages = copy(bytes.as_slice(), &vmdesc, &mut again).unwrap();
        assert!(pages >= 3);
        assert!(again == bytes);

        // The same from a socket, in whatever pieces it delivers.
        let (mut sender, receiver) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let sent = &bytes;
            scope.spawn(move || {
                for piece in sent.chunks(777) {
                    sender.write_all(piece).unwrap();
                }
            });
            let mut again = Vec::new();
            copy(receiver, &vmdesc, &mut again).unwrap();
            assert!(again == bytes);
        });
    }
}

#[test]
fn values_of_our_own_devices() {
    let bytes = small();
    let vmdesc = vmdesc_of(&bytes);
    let mut from = StreamReader::new(Cursor::new(bytes.as_slice()), FileOffset(0));
    let mut found = 0;
    while let Some(event) = from.next_event().unwrap() {
        match event.value {
            Event::SectionStart(_) | Event::SectionPart { .. } | Event::SectionEnd { .. } => {
                // Up to the first device, by its name: this stream's RAM has no such bytes.
                let at = bytes.windows(8).position(|window| window == b"\x04\0\0\0\x03\x03cp").unwrap() as u64;
                from.seek_to(FileOffset(at - 5)).unwrap();
            }
            Event::SectionFull(header) => {
                let desc = vmdesc.device(&header.name, header.instance).unwrap();
                let at = from.position();
                let body = from.read_vec(desc.body_len().unwrap(), ByteLen(1000)).unwrap();
                let value = walk(&body, at, desc).unwrap();
                found += 1;
                if header.instance == 1 {
                    assert_eq!(value.field("raw").unwrap().bytes(), [9; 33]);
                    assert!(value.field("raw").unwrap().as_u64().is_err());
                    continue;
                }
                assert_eq!(value.field("regs").unwrap().as_u64s().unwrap(), [1, 2, 3]);
                assert_eq!(value.field("regs").unwrap().range.start, at);
                let selectors = value.field("segment").unwrap().members().iter();
                let selectors = selectors.map(|one| one.field("selector").unwrap().as_u64().unwrap());
                assert_eq!(selectors.collect::<Vec<_>>(), [5, 6], "alike: one array");
                let flags = value.fields("flag").map(|one| one.members().len());
                assert_eq!(flags.collect::<Vec<_>>(), [0, 1, 1], "not alike: one by one");
                let nmi = value.field("cpu/nmi").unwrap();
                assert_eq!(nmi.version(), Some(2));
                assert_eq!(nmi.field("level").unwrap().as_i64().unwrap(), -3);
                assert!(value.get("nothing").is_none());
                assert!(value.field("nothing").unwrap_err().to_string().contains("nothing"));
            }
            _ => {}
        }
    }
    assert_eq!(found, 2);
}

#[test]
fn commands_keep_their_meaning() {
    let range = (ByteLen(0), ByteLen(4096));
    let all = [
        Command::OpenReturnPath,
        Command::Ping(7),
        Command::PostcopyAdvise { page_sizes: 0x20_1000, target_page_size: 4096 },
        Command::PostcopyAdviseWithoutRam,
        Command::PostcopyListen,
        Command::PostcopyRun,
        Command::PostcopyRamDiscard { block: "pc.ram".into(), ranges: vec![range, range] },
        Command::Packaged { length: 9 },
        Command::EnableColo,
        Command::PostcopyResume,
        Command::RecvBitmap { block: "pc.ram".into() },
        Command::SwitchoverStart,
    ];
    for command in all {
        let raw = command.encode().unwrap();
        assert_ne!(raw.name(), "UNKNOWN");
        assert_eq!(raw.decode(FileOffset(0)).unwrap(), command);
        let mut longer = raw.clone();
        longer.payload.push(0);
        assert!(longer.decode(FileOffset(0)).is_err() || matches!(command, Command::PostcopyAdviseWithoutRam));
    }
    let too_many = Command::PostcopyRamDiscard { block: "pc.ram".into(), ranges: vec![range; 5000] };
    assert!(too_many.encode().is_err());
}

#[test]
fn a_nested_stream_ends_where_its_bytes_do() {
    let mut out = StreamWriter::new(Vec::new());
    out.command(&Command::PostcopyListen).unwrap();
    out.event(&Event::SectionEnd { id: 9 }).unwrap();
    RecordWriter::new().end(&mut out).unwrap();
    out.event(&Event::Footer { id: 9 }).unwrap();
    out.command(&Command::PostcopyRun).unwrap();
    let bytes = out.into_inner();
    let mut from = StreamReader::nested(bytes.as_slice(), FileOffset(100));
    let mut events = 0;
    while let Some(event) = from.next_event().unwrap() {
        events += 1;
        if let Event::SectionEnd { .. } = event.value {
            assert_eq!(RecordReader::new().next(&mut from).unwrap(), Record::EndOfSection);
        }
    }
    assert_eq!(events, 4);
    assert_eq!(from.position(), FileOffset(100 + bytes.len() as u64));
    // A stream with a header has to say that it ends.
    let whole = small();
    let mut from = StreamReader::new(&whole[..8], FileOffset(0));
    assert!(from.next_event().unwrap().is_some());
    assert!(matches!(from.next_event(), Err(StreamError::Truncated { .. })));
}

#[test]
fn lists_repeat_their_keys() {
    let text = br#"{"devices": [{"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": [
        {"name": "list", "type": "qtailq",
            "vmsd_name": "e", "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1}],
            "vmsd_name": "e", "version": 1, "fields": [{"name": "x", "type": "uint8", "size": 1}], "size": 5},
        {"name": "a", "index": 0, "type": "uint8", "size": 1}, {"name": "a", "type": "uint8", "size": 1}]}]}"#;
    let vmdesc = VmDesc::parse(text).unwrap();
    let body = [1, 10, 1, 11, 0, 20, 21];
    let value = walk(&body, FileOffset(0), &vmdesc.devices()[0]).unwrap();
    let list = value.field("list").unwrap();
    let xs: Vec<u64> = list.members().iter().map(|e| e.field("x").unwrap().as_u64().unwrap()).collect();
    assert_eq!(xs, [10, 11]);
    assert_eq!(value.fields("a").map(|a| a.as_u64().unwrap()).collect::<Vec<_>>(), [20, 21]);
    let mut again = Vec::new();
    value.encode(&mut again);
    assert_eq!(again, body);
    assert!(walk(&[1, 10, 0, 11, 0, 20, 21], FileOffset(0), &vmdesc.devices()[0]).is_err());
    assert!(walk(&body[..6], FileOffset(0), &vmdesc.devices()[0]).is_err());
}

#[test]
fn hostile_descriptions_cost_little() {
    let field = |size: &str, more: &str| {
        format!(
            r#"{{"devices": [{{"name": "d", "vmsd_name": "d", "version": 1,
            "fields": [{{"name": "f", "type": "struct", {more} "size": {size}}}]}}]}}"#
        )
    };
    let empty = r#""array_len": 18446744073709551615, "struct": {"vmsd_name": "e", "version": 1, "fields": []},"#;
    let desc = VmDesc::parse(field("0", empty).as_bytes()).unwrap();
    assert!(walk(&[], FileOffset(0), &desc.devices()[0]).unwrap_err().to_string().contains("without content"));
    let few = r#""array_len": 1000, "struct": {"vmsd_name": "e", "version": 1, "fields": []},"#;
    let desc = VmDesc::parse(field("0", few).as_bytes()).unwrap();
    let value = walk(&[], FileOffset(0), &desc.devices()[0]).unwrap();
    assert_eq!(value.field("f").unwrap().members().len(), 1000);
    let one = r#""array_len": 2000000, "struct": {"vmsd_name": "e", "fields": [{"size": 1}]},"#;
    let desc = VmDesc::parse(field("1", one).as_bytes()).unwrap();
    let error = walk(&[0; 2_000_000], FileOffset(0), &desc.devices()[0]).unwrap_err();
    assert!(error.to_string().contains("values"), "{error}");
    let desc = VmDesc::parse(field("18446744073709551615", r#""array_len": 2,"#).as_bytes()).unwrap();
    assert_eq!(desc.devices()[0].body_len(), None);
    assert!(walk(&[], FileOffset(0), &desc.devices()[0]).is_err());
    for size in ["-1", "1.5", "\"1\"", "null", "18446744073709551616"] {
        assert!(VmDesc::parse(field(size, "").as_bytes()).is_err(), "{size}");
    }
    let deep = "[".repeat(100_000);
    assert!(VmDesc::parse(deep.as_bytes()).is_err());
    let wide = format!("{{\"devices\": [{}0]}}", "0,".repeat(2 << 20));
    assert!(VmDesc::parse(wide.as_bytes()).is_err());
}

/// As large as a description may be: a look at all devices, or all fields of one, for each section would take hours.
#[test]
fn many_sections_cost_no_more_each() {
    let devices: Vec<String> =
        (0..100_000).map(|at| format!(r#"{{"name": "d{}", "instance_id": {}}}"#, at % 7, at / 7)).collect();
    let twice = r#"{"name": "d0", "instance_id": 1, "vmsd_name": "second"}"#;
    let text = format!(r#"{{"devices": [{}, {twice}]}}"#, devices.join(","));
    let desc = VmDesc::parse(text.as_bytes()).unwrap();
    assert_eq!(desc.devices().len(), 100_001);
    for at in 0..100_000 {
        let device = desc.device(&format!("d{}", at % 7), at / 7).unwrap();
        assert!(std::ptr::eq(device, &raw const desc.devices()[at as usize]), "{at}: another, or the second of two");
    }
    for (name, instance) in [("d0", 1 << 20), ("d", 0), ("d7", 0), ("e", 0), ("", 0)] {
        assert_eq!(desc.device(name, instance), None);
    }

    let fields = vec![r#"{"name": "f", "type": "uint8", "size": 0}"#; 100_000].join(",");
    let text = format!(r#"{{"devices": [{{"name": "d", "vmsd_name": "d", "version": 1, "fields": [{fields}]}}]}}"#);
    let desc = VmDesc::parse(text.as_bytes()).unwrap();
    for _ in 0..1_000_000 {
        assert_eq!(desc.device("d", 0).unwrap().body_len(), Some(ByteLen(0)));
    }
}

/// What is described in a field itself, and is not all of it, is not looked through again for each element.
#[test]
fn many_elements_cost_no_more_each() {
    let inline = vec![r#"{"size": 2}"#; 200_000].join(",");
    let text = format!(
        r#"{{"devices": [{{"name": "d", "fields": [{{"name": "a", "array_len": 200000, "size": 1, "struct":
        {{"vmsd_name": "e", "fields": [{{"name": "i", "size": 1, "vmsd_name": "t", "fields": [{inline}]}}]}}}}]}}]}}"#
    );
    let desc = VmDesc::parse(text.as_bytes()).unwrap();
    let body = vec![7; 200_000];
    let value = walk(&body, FileOffset(0), &desc.devices()[0]).unwrap();
    let elements = value.field("a").unwrap().members();
    assert_eq!(elements.len(), 200_000);
    assert!(elements.iter().all(|element| element.field("i").unwrap().bytes() == [7]));
}

/// Sections that started are found by their number, however many there are.
#[test]
fn many_sections_that_go_on() {
    let mut out = StreamWriter::new(Vec::new());
    let count = 60_000;
    for id in 0..count {
        let header = SectionHeader { id, name: "s".into(), instance: id, version: 1 };
        out.event(&Event::SectionStart(header)).unwrap();
        out.event(&Event::Footer { id }).unwrap();
    }
    for _ in 0..5 {
        for id in (0..count).rev() {
            out.event(&Event::SectionPart { id }).unwrap();
            out.event(&Event::Footer { id }).unwrap();
        }
    }
    let bytes = out.into_inner();
    let mut from = StreamReader::nested(bytes.as_slice(), FileOffset(0));
    let mut parts = 0;
    while let Some(event) = from.next_event().unwrap() {
        if let Event::SectionPart { id } = event.value {
            assert_eq!(from.section_name(id), Some("s"));
            parts += 1;
        }
    }
    assert_eq!(parts, 5 * count);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_streams_end_in_an_error_or_an_end(
        cut in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let whole = small();
        let vmdesc = vmdesc_of(&whole);
        let mut bytes = whole.clone();
        for (at, new) in changes {
            let at = at.index(bytes.len());
            bytes[at] = new;
        }
        bytes.truncate(cut.index(whole.len()) + 1);
        let mut again = Vec::new();
        if copy(bytes.as_slice(), &vmdesc, &mut again).is_ok() {
            prop_assert!(again == bytes);
        }
        let _ = find_vmdesc(&mut Cursor::new(&bytes), FileOffset(0)..FileOffset(bytes.len() as u64));
    }

    #[test]
    fn any_text_is_a_description_or_an_error(text in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = VmDesc::parse(&text);
    }
}

/// Found by fuzzing: an offset in a record that has none would be lost.
#[test]
fn records_without_a_page_have_no_offset() {
    for word in [0x1010u64, 0x1200] {
        let bytes = word.to_be_bytes();
        let mut from = StreamReader::nested(bytes.as_slice(), FileOffset(0));
        assert!(RecordReader::new().next(&mut from).is_err(), "{word:#x}");
    }
}
