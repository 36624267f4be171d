//! Plain streams at a socket: real ones, random ones, broken ones.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use page_files::MappedRamSink;
use page_source::conformance::{Page, Suite};
use page_source::{End, OneShot, PageSink, SinkError, Urgency};
use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun};
use proptest::prelude::*;
use qemu_pages::receive::{DeviceState, QemuStream, ReadError};
use testkit::collector::{Collector, Got};
use vmstate::ram::RecordWriter;
use vmstate::{
    Command, Configuration, ConfigurationSubsection, DeviceWriter, Event, Section, SectionHeader, StreamWriter,
};

const LIMIT: ByteLen = ByteLen(64 << 20);

/// A stream that is made part by part.
struct Stream {
    out: StreamWriter<Vec<u8>>,
    records: RecordWriter,
}

impl Stream {
    fn with(configuration: Configuration) -> Stream {
        let mut out = StreamWriter::new(Vec::new());
        out.event(&Event::Header).unwrap();
        out.event(&Event::Configuration(configuration)).unwrap();
        Stream { out, records: RecordWriter::new() }
    }

    /// Up to the end of the section that lists the blocks; lengths in pages.
    fn new(blocks: &[(&str, u64)]) -> Stream {
        let mut stream = Stream::with(Configuration::new("pc-i440fx-10.0"));
        stream.list(blocks.iter().map(|(_, pages)| pages * 4096).sum(), blocks);
        stream.records.end(&mut stream.out).unwrap();
        stream.footer()
    }

    fn list(&mut self, total: u64, blocks: &[(&str, u64)]) {
        self.out
            .event(&Event::SectionStart(SectionHeader { id: 2, name: "ram".into(), instance: 0, version: 4 }))
            .unwrap();
        self.records.mem_size(&mut self.out, ByteLen(total)).unwrap();
        for (name, pages) in blocks {
            self.out.counted_string(name).unwrap();
            self.out.u64(pages * 4096).unwrap();
        }
    }

    fn footer(mut self) -> Stream {
        self.out.event(&Event::Footer { id: 2 }).unwrap();
        self
    }

    /// A section of pages, all bytes of each alike.
    fn part(mut self, pages: &[(&str, u64, u8)]) -> Stream {
        self.out.event(&Event::SectionPart { id: 2 }).unwrap();
        for (block, page, fill) in pages {
            self.records.page(&mut self.out, block, ByteLen(page * 4096)).unwrap();
            self.out.bytes(&[*fill; 4096]).unwrap();
        }
        self.records.end(&mut self.out).unwrap();
        self.footer()
    }

    fn zeros(mut self, pages: &[(&str, u64)]) -> Stream {
        self.out.event(&Event::SectionPart { id: 2 }).unwrap();
        for (block, page) in pages {
            self.records.zero(&mut self.out, block, ByteLen(page * 4096)).unwrap();
        }
        self.records.end(&mut self.out).unwrap();
        self.footer()
    }

    fn bytes(mut self, bytes: &[u8]) -> Stream {
        self.out.bytes(bytes).unwrap();
        self
    }

    fn event(mut self, event: &Event) -> Stream {
        self.out.event(event).unwrap();
        self
    }

    fn finish(self) -> Vec<u8> {
        let mut bytes = self.out.into_inner();
        bytes.extend(devices());
        bytes
    }
}

/// Sections of two devices, the end mark, the description.
fn devices() -> Vec<u8> {
    let mut devices = DeviceWriter::new(3);
    devices.push(Section::builder("cpu", 0, 1).u64s("regs", &[1, 2, 3]).build().unwrap());
    devices.push(Section::builder("timer", 0, 2).buffer("raw", &[9; 33]).build().unwrap());
    devices.finish("pc-i440fx-10.0").unwrap()
}

/// Sends the bytes, then hangs up; the other end.
fn send(bytes: Vec<u8>) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || {
        // A reader that has seen enough hangs up.
        let _ = theirs.write_all(&bytes);
    });
    ours
}

/// What a stream gives, to its end.
fn read(bytes: Vec<u8>) -> Result<(Known, Arc<Collector>), ReadError> {
    let source = QemuStream::open(send(bytes), "the peer", LIMIT)?;
    let sink = Collector::new();
    let known = run(source, Arc::clone(&sink) as Arc<dyn PageSink>, || !sink.state.lock().ends.is_empty());
    Ok((known, sink))
}

/// What is known of a stream that was read.
struct Known {
    layout: Layout,
    machine: String,
    device_state: DeviceState,
}

fn run(source: QemuStream, sink: Arc<dyn PageSink>, ended: impl Fn() -> bool) -> Known {
    let (layout, machine) = (source.layout().clone(), source.configuration().machine.clone());
    let device_state = source.device_state();
    let feed = Box::new(source).start(sink).unwrap();
    while !ended() {
        thread::yield_now();
    }
    feed.finish().unwrap();
    Known { layout, machine, device_state }
}

/// How it ended: every stream does, exactly once.
fn end(sink: &Collector) -> Result<(), String> {
    let state = sink.state.lock();
    assert_eq!(state.ends.len(), 1);
    match &state.ends[0] {
        End::Complete => Ok(()),
        End::Broken(error) => Err(error.to_string()),
        End::Stopped => Err("stopped".to_owned()),
    }
}

/// It is refused, with all of these words.
fn refused(stream: Vec<u8>, words: &[&str]) {
    let error = match read(stream) {
        Err(error) => error.to_string(),
        Ok((source, sink)) => {
            assert_eq!(source.device_state.get(), None);
            end(&sink).unwrap_err()
        }
    };
    for word in words {
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_stream_is_a_source_that_keeps_to_the_contract() {
    let fill = |page: u64| u8::try_from(page * 7 % 5).unwrap();
    let make = || {
        let pages: Vec<(&str, u64, u8)> = (0..120).rev().map(|page| ("a", page, fill(page))).collect();
        let stream = Stream::new(&[("a", 120), ("b", 3)]).part(&pages);
        Box::new(QemuStream::open(send(stream.finish()), "the peer", LIMIT).unwrap()) as Box<dyn OneShot>
    };
    let content = move |one: PageRun| if one.block == BlockId(0) { fill(one.first.0) } else { 0 };
    Suite::new(move |one| Page::Content(vec![content(one); 4096])).one_shot(make).unwrap();
}

#[test]
fn pages_in_any_order_then_devices_byte_for_byte() {
    let stream = Stream::new(&[("pc.ram", 600), ("pc.bios", 2)]);
    let many: Vec<(&str, u64, u8)> = (0..599).map(|page| ("pc.ram", page, 1 + (page % 250) as u8)).collect();
    let stream = stream.part(&[("pc.ram", 599, 7), ("pc.bios", 1, 8)]).part(&many).part(&[]).zeros(&[("pc.bios", 0)]);
    let (source, sink) = read(stream.finish()).unwrap();
    end(&sink).unwrap();
    assert_eq!(source.device_state.get(), Some(devices().as_slice()));
    assert_eq!(source.machine, "pc-i440fx-10.0");
    let ram = sink.content(&source.layout, BlockId(0));
    for (page, content) in ram.chunks(4096).enumerate() {
        let fill = if page == 599 { 7 } else { 1 + u8::try_from(page % 250).unwrap() };
        assert_eq!(content, [fill; 4096], "{page}");
    }
    assert_eq!(sink.once(1, 0), Got::Zero);
    assert_eq!(sink.once(1, 1), Got::Data(vec![8; 4096]));
    // Neighbours were told together.
    assert!(sink.state.lock().runs.len() < 10);
}

#[test]
fn zero_content_and_what_is_left_out_are_zero() {
    let stream = Stream::new(&[("a", 5)]).part(&[("a", 3, 9), ("a", 4, 0), ("a", 0, 0)]);
    let (_, sink) = read(stream.finish()).unwrap();
    end(&sink).unwrap();
    for page in [0, 1, 2, 4] {
        assert_eq!(sink.once(0, page), Got::Zero, "{page}");
    }
    assert_eq!(sink.once(0, 3), Got::Data(vec![9; 4096]));
}

#[test]
fn a_stream_that_is_cut_anywhere_is_not_complete() {
    let stream = Stream::new(&[("a", 2)]).part(&[("a", 1, 9)]).zeros(&[("a", 0)]).finish();
    for length in (0..stream.len()).filter(|at| *at < 4400 && *at % 7 == 0 || stream.len() - at < 700) {
        refused(stream[..length].to_vec(), &[]);
    }
    let mut longer = stream.clone();
    longer.push(0);
    refused(longer, &["description"]);
    assert_eq!(end(&read(stream).unwrap().1), Ok(()));
}

#[test]
fn damage_is_an_error_or_content_and_never_a_panic() {
    let stream = Stream::new(&[("a", 2)]).part(&[("a", 1, 9)]).zeros(&[("a", 0)]).finish();
    let (first, content) = (stream.iter().position(|byte| *byte == 9).unwrap(), 4096);
    for at in (0..stream.len()).filter(|at| !(first..first + content).contains(at)) {
        for bit in [0x01, 0x80] {
            let mut damaged = stream.clone();
            damaged[at] ^= bit;
            if let Ok((source, sink)) = read(damaged) {
                assert_eq!(end(&sink).is_ok(), source.device_state.get().is_some());
            }
        }
    }
}

#[test]
fn hostile_streams_are_refused_with_their_offset() {
    let a = || Stream::new(&[("a", 4)]);
    refused(a().part(&[("a", 2, 1), ("a", 2, 1)]).finish(), &["offset ", "\"a\"", "8192", "second time"]);
    refused(a().part(&[("a", 2, 1)]).zeros(&[("a", 2)]).finish(), &["second time"]);
    refused(a().zeros(&[("a", 4)]).finish(), &["no page at 16384"]);
    refused(a().zeros(&[("b", 0)]).finish(), &["\"b\"", "no page"]);
    let xbzrle = |mut stream: Stream| {
        stream = stream.event(&Event::SectionPart { id: 2 }).bytes(&0x40u64.to_be_bytes());
        stream.bytes(&[1, b'a', 1, 0, 1, 0])
    };
    refused(xbzrle(a()).finish(), &["xbzrle"]);
    let multifd = a().event(&Event::SectionPart { id: 2 }).bytes(&0x200u64.to_be_bytes());
    refused(multifd.finish(), &["multifd"]);
    let again = a().event(&Event::SectionPart { id: 2 }).bytes(&(4096u64 | 4).to_be_bytes());
    refused(again.finish(), &["second list"]);
    refused(a().event(&Event::Command(Command::PostcopyListen.encode().unwrap())).finish(), &["command"]);
    refused(a().event(&Event::Eof).bytes(&[]).out.into_inner(), &["device state"]);
    let other = SectionHeader { id: 9, name: "dirty-bitmap".into(), instance: 0, version: 1 };
    refused(a().event(&Event::SectionStart(other)).finish(), &["dirty-bitmap"]);
    let mut twice = DeviceWriter::new(3);
    (0..2).for_each(|_| twice.push(Section::builder("cpu", 0, 1).u64s("regs", &[1]).build().unwrap()));
    let twice = a().bytes(&twice.finish("pc-i440fx-10.0").unwrap()).out.into_inner();
    refused(twice, &["second state of device \"cpu\" 0"]);
    let mut garbled = a().finish();
    let text = garbled.iter().rposition(|byte| *byte == 0).unwrap();
    let text = text + garbled[text..].iter().position(|byte| *byte == b'{').unwrap();
    garbled[text + 1] = b'!';
    refused(garbled, &["column 2", &format!("the description begins at offset {text:#x})")]);
    // What may be there: the guest has stopped, the end of RAM.
    let switched = a().event(&Event::Command(Command::SwitchoverStart.encode().unwrap()));
    let switched = switched.event(&Event::SectionEnd { id: 2 }).bytes(&0x10u64.to_be_bytes()).footer();
    end(&read(switched.finish()).unwrap().1).unwrap();
}

#[test]
fn hostile_lists_of_blocks_are_refused() {
    let listing = |total: u64, blocks: &[(&str, u64)]| {
        let mut stream = Stream::with(Configuration::new("pc"));
        stream.list(total, blocks);
        stream.finish()
    };
    refused(listing(1 << 50, &[("a", 1 << 38)]), &["1125899906842624", "67108864"]);
    refused(listing(4096, &[("a", 2)]), &["\"a\" of 8192"]);
    refused(listing(8192, &[("a", 0), ("a", 0)]), &["\"a\" of 0"]);
    refused(listing(8192, &[("a", 1), ("a", 1)]), &["\"a\""]);
    refused(listing(8192, &[("a", u64::MAX / 4096)]), &["\"a\""]);
    let mut capability = Configuration::new("pc");
    capability.subsections.push(ConfigurationSubsection::Capabilities(vec!["mapped-ram".into()]));
    refused(Stream::with(capability).finish(), &["mapped-ram"]);
    refused(Stream::with(Configuration::new("pc")).finish(), &["\"cpu\"", "before RAM"]);
    refused(b"\x16\x03\x01 no stream".to_vec(), &["offset 0"]);
    refused(Vec::new(), &["offset 0"]);
}

#[test]
fn a_sink_that_takes_no_more_ends_it() {
    let stream = Stream::new(&[("a", 4)]).part(&[("a", 0, 1), ("a", 2, 1), ("a", 3, 1)]);
    let source = QemuStream::open(send(stream.finish()), "the peer", LIMIT).unwrap();
    let sink = Collector::with_hook(|_| SinkError::stopped("enough").into());
    run(source, Arc::clone(&sink) as Arc<dyn PageSink>, || !sink.state.lock().ends.is_empty());
    assert!(end(&sink).unwrap_err().contains("enough"));
    assert!(sink.state.lock().runs.is_empty());
}

#[test]
fn dropping_the_feed_hangs_up_on_a_peer_that_says_nothing() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(&Stream::new(&[("a", 4)]).out.into_inner()).unwrap();
    let source = QemuStream::open(ours, "the peer", LIMIT).unwrap();
    let sink = Collector::new();
    let feed = Box::new(source).start(Arc::clone(&sink) as Arc<dyn PageSink>).unwrap();
    feed.request(PageRun::new(BlockId(0), PageIndex(0), PageCount(4)), Urgency::Demand);
    drop(feed);
    assert_eq!(end(&sink).unwrap_err(), "stopped");
    assert!(theirs.write_all(&[0; 4096]).is_err());
    // And one that says nothing at all.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let opening = thread::spawn(move || QemuStream::open(ours, "the peer", LIMIT).map(drop));
    theirs.shutdown(Shutdown::Both).unwrap();
    assert!(opening.join().unwrap().is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any order, any mix of content and zeros, any cut into sections: a mapped-ram file with exactly that.
    #[test]
    fn any_order_becomes_the_same_file(
        order in Just((0u64..300).collect::<Vec<_>>()).prop_shuffle(),
        fills in proptest::collection::vec(0u8..4, 300),
        cuts in proptest::collection::vec(1usize..60, 5),
    ) {
        let mut stream = Stream::new(&[("a", 200), ("b", 100)]);
        let place = |page: u64| if page < 200 { ("a", page) } else { ("b", page - 200) };
        let mut rest = order.as_slice();
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            let pages: Vec<(&str, u64, u8)> = now.iter().map(|page| {
                let (block, at) = place(*page);
                (block, at, fills[usize::try_from(*page).unwrap()])
            }).collect();
            stream = stream.part(&pages);
            rest = later;
        }
        let source = QemuStream::open(send(stream.finish()), "the peer", LIMIT).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let writer = mapped_ram::Writer::create(&path, source.configuration(), source.layout().clone()).unwrap();
        let sink = Arc::new(MappedRamSink::new(writer));
        let known = run(source, Arc::clone(&sink) as Arc<dyn PageSink>, || sink.ended().is_some());
        sink.publish(known.device_state.get().unwrap()).unwrap();
        let file = mapped_ram::Snapshot::open(&path).unwrap();
        for page in 0..300u64 {
            let (block, at) = place(page);
            let (id, _) = file.layout().find(block).unwrap();
            let fill = fills[usize::try_from(page).unwrap()];
            let stored = file.load_run(id, PageIndex(at), PageCount(1)).unwrap().is_stored();
            prop_assert_eq!(stored, fill != 0);
            if stored {
                let offset = file.page_offset(id, PageIndex(at)).unwrap();
                prop_assert_eq!(file.read(offset..offset + ByteLen(4096)).unwrap(), vec![fill; 4096]);
            }
        }
    }
}

/// Counts the pages of a plain stream and keeps their content, by nothing but the format's own words.
fn plainly(bytes: &[u8]) -> Vec<(String, u64, Option<Vec<u8>>)> {
    let number = |at: usize, len: usize| bytes[at..at + len].iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    let text = |at: usize| {
        let end = at + 1 + usize::from(bytes[at]);
        (String::from_utf8(bytes[at + 1..end].to_vec()).unwrap(), end)
    };
    let mut at = 13 + usize::try_from(number(9, 4)).unwrap();
    let (mut pages, mut block) = (Vec::new(), String::new());
    loop {
        let kind = bytes[at];
        at += 5;
        match kind {
            1 => at = text(at).1 + 8,
            2 | 3 => {}
            _ => return pages,
        }
        loop {
            let word = number(at, 8);
            let (offset, flags) = (word & !4095, word & 4095);
            at += 8;
            if flags == 0x10 {
                break;
            }
            if flags == 4 {
                let mut left = offset;
                while left > 0 {
                    at = text(at).1;
                    left -= number(at, 8);
                    at += 8;
                }
                continue;
            }
            if flags & 0x20 == 0 {
                (block, at) = text(at);
            }
            let content = (flags & 8 != 0).then(|| bytes[at..at + 4096].to_vec());
            at += if content.is_some() { 4096 } else { 1 };
            pages.push((block.clone(), offset / 4096, content));
        }
        assert_eq!(bytes[at], 0x7e);
        at += 5;
    }
}

#[test]
fn a_real_background_snapshot_is_read() {
    let samples = testkit::samples::full();
    if samples.is_empty() {
        return testkit::require::without("samples", "no ../shared/samples next to the workspace");
    }
    let samples: Vec<_> = samples.iter().filter(|sample| sample.name.ends_with("bg.stream")).collect();
    assert!(!samples.is_empty());
    for sample in samples {
        let bytes = sample.bytes().unwrap();
        let pages = plainly(&bytes);
        let (source, sink) = read(bytes.clone()).unwrap();
        end(&sink).unwrap();
        assert_eq!(pages.len() as u64 * 4096, source.layout.total().0);
        for (block, page, content) in pages {
            let (id, _) = source.layout.find(&block).unwrap();
            let expected = content.filter(|bytes| bytes.iter().any(|byte| *byte != 0)).map_or(Got::Zero, Got::Data);
            assert_eq!(sink.once(id.0, page), expected, "{block} {page}");
        }
        let state = source.device_state.get().unwrap();
        assert!(state.len() > 50_000 && bytes.ends_with(state));
    }
}
