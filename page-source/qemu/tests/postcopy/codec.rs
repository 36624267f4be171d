//! Conversations of real QEMUs through both sides of the codec: read, and written again, byte for byte.

use std::collections::{HashMap, VecDeque};
use std::io::Read;

use page_units::{ByteLen, FileOffset};
use qemu_pages::wire::record::{self, Reader, Record};
use qemu_pages::wire::return_path::{Decoder, Message};
use vmstate::{Command, Event, StreamReader, StreamWriter, kind};

/// The body of a section.
struct Body<'a, R>(&'a mut StreamReader<R>);

impl<R: Read> Read for Body<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.0.read_exact(into).map_err(std::io::Error::other)?;
        Ok(into.len())
    }
}

/// What a source sent.
#[derive(Default)]
pub(crate) struct Sent {
    pub(crate) blocks: Vec<(String, u64)>,
    pub(crate) pages: HashMap<(String, u64), Vec<u8>>,
    pub(crate) data: u64,
    pub(crate) zeros: u64,
    pub(crate) packages: u64,
}

impl Sent {
    /// Takes the records of a section, writing each of them again into `out`. False at the end of the input.
    fn records(&mut self, from: &mut impl Read, reader: &mut Reader, out: &mut Vec<u8>) -> bool {
        let mut page = [0; 4096];
        loop {
            let Ok(found) = reader.next(from, &mut page) else { return false };
            let (block, same) = (reader.block().to_owned(), !reader.is_named());
            match found {
                Record::End => {
                    out.extend_from_slice(&record::END.to_be_bytes());
                    return true;
                }
                Record::Page(index) => {
                    record::push_page(out, &block, index, same, &page);
                    self.data += 1;
                    self.pages.insert((block, index.0), page.to_vec());
                }
                Record::Zero(index) => {
                    record::push_zero(out, &block, index, same);
                    self.zeros += 1;
                    self.pages.remove(&(block, index.0));
                }
            }
        }
    }

    /// Reads the main connection, writing each part again: what comes out is what went in.
    pub(crate) fn main(&mut self, wire: &[u8]) {
        let mut from = StreamReader::new(wire, FileOffset(0));
        let mut out = StreamWriter::new(Vec::new());
        let mut reader = Reader::new();
        while let Some(located) = from.next_event().unwrap() {
            let event = located.value;
            out.event(&event).unwrap();
            match event {
                Event::SectionStart(_) => {
                    let word = from.u64().unwrap();
                    out.u64(word).unwrap();
                    let mut left = word & !0xfff;
                    while left > 0 {
                        let (name, length) = (from.counted_string().unwrap(), from.u64().unwrap());
                        out.counted_string(&name).unwrap();
                        out.u64(length).unwrap();
                        left -= length;
                        self.blocks.push((name, length));
                    }
                    assert!(self.records(&mut Body(&mut from), &mut reader, out.get_mut()));
                }
                Event::SectionPart { .. } | Event::SectionEnd { .. } => {
                    assert!(self.records(&mut Body(&mut from), &mut reader, out.get_mut()));
                }
                Event::Command(raw) => match raw.decode(FileOffset(0)).unwrap() {
                    Command::Packaged { length } => {
                        let package = from.read_vec(ByteLen(length.into()), ByteLen(1 << 30)).unwrap();
                        out.bytes(&again(&package)).unwrap();
                        self.packages += 1;
                    }
                    command => assert_eq!(command.encode().unwrap(), raw),
                },
                Event::Eof => break,
                _ => {}
            }
        }
        assert!(out.into_inner() == wire, "the stream does not come back");
    }

    /// The same for the second connection.
    pub(crate) fn fast(&mut self, wire: &[u8]) {
        let (mut from, mut out, mut reader) = (wire, Vec::new(), Reader::new());
        while self.records(&mut from, &mut reader, &mut out) {}
        assert!(out == wire, "the second connection does not come back");
    }
}

/// Reads what is in a package, and writes it again.
fn again(package: &[u8]) -> Vec<u8> {
    let mut from = StreamReader::nested(package, FileOffset(0));
    let mut out = StreamWriter::new(Vec::new());
    let (mut commands, mut devices) = (Vec::new(), Vec::new());
    while let Some(located) = from.next_event().unwrap() {
        match located.value {
            Event::Command(raw) => {
                let command = raw.decode(FileOffset(0)).unwrap();
                out.command(&command).unwrap();
                commands.push(command);
            }
            Event::SectionFull(header) => {
                let length = body(from.get_mut(), header.id);
                out.event(&Event::SectionFull(header.clone())).unwrap();
                out.bytes(&from.read_vec(ByteLen::of(length), ByteLen::of(length)).unwrap()).unwrap();
                devices.push(header.name);
            }
            footer @ Event::Footer { .. } => out.event(&footer).unwrap(),
            other => panic!("{other:?} in a package"),
        }
    }
    // QEMU 11 asks once more whether it is heard, before the guest is started.
    commands.retain(|command| *command != Command::Ping(66));
    assert_eq!(commands, [Command::PostcopyListen, Command::Ping(3), Command::PostcopyRun]);
    for name in ["timer", "cpu"] {
        assert!(devices.iter().any(|device| device == name), "no {name} in {devices:?}");
    }
    out.into_inner()
}

/// How long the body of a section is: up to its footer, behind which something begins that can be there.
fn body(rest: &[u8], id: u32) -> usize {
    let mut footer = vec![kind::FOOTER];
    footer.extend_from_slice(&id.to_be_bytes());
    let ends = |at: &usize| {
        let next = rest.get(at + footer.len());
        rest[*at..].starts_with(&footer) && next.is_none_or(|next| [kind::FULL, kind::COMMAND].contains(next))
    };
    (0..rest.len()).find(ends).expect("a section without a footer")
}

/// Reads the return path, and writes it again.
pub(crate) fn back(wire: &[u8]) -> VecDeque<Message> {
    let mut decoder = Decoder::new(ByteLen(1 << 20));
    let (mut messages, mut out) = (VecDeque::new(), Vec::new());
    for piece in wire.chunks(7) {
        decoder.take(piece);
        while let Some(message) = decoder.next_message().unwrap() {
            message.push(&mut out);
            messages.push_back(message);
        }
    }
    assert!(out == wire, "the return path does not come back");
    messages
}
