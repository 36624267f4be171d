//! Lists what is in a plain migration stream, as `migrate file:` without mapped-ram writes it.
//!
//! `cargo run -p vmstate --example stream -- FILE`

#![expect(clippy::print_stdout, reason = "a program")]

use std::error::Error;
use std::fs::File;
use std::io::BufReader;

use page_units::{ByteLen, FileOffset, PAGE_SIZE};
use vmstate::ram::{Record, RecordReader};
use vmstate::{Event, StreamReader, VmDesc, find_vmdesc, walk};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: stream FILE")?;
    let mut file = File::open(path)?;
    let end = FileOffset(file.metadata()?.len());
    // Only the description at the end tells where the sections of the devices end.
    let text = find_vmdesc(&mut file, FileOffset(0)..end)?.ok_or("no description of the device state")?;
    let vmdesc = VmDesc::parse(&text.value)?;

    std::io::Seek::rewind(&mut file)?;
    let mut stream = StreamReader::new(BufReader::new(file), FileOffset(0));
    let mut records = RecordReader::new();
    while let Some(event) = stream.next_event()? {
        let at = event.range.start;
        match event.value {
            Event::Configuration(configuration) => {
                println!("{at}: machine type {}", configuration.machine);
                if configuration.has_capability(vmstate::MAPPED_RAM) {
                    return Err("a mapped-ram file: see the crate mapped-ram".into());
                }
            }
            Event::Command(command) => println!("{at}: command {}", command.name()),
            Event::SectionStart(_) | Event::SectionPart { .. } | Event::SectionEnd { .. } => {
                let (pages, zeros) = ram_section(&mut stream, &mut records)?;
                println!("{at}: RAM, {pages} pages with content, {zeros} of zeros");
            }
            Event::SectionFull(header) => {
                let (name, instance) = (&header.name, header.instance);
                let desc = vmdesc.device(name, instance).ok_or("a device that is not described")?;
                let length = desc.body_len().ok_or("a device that is too long")?;
                let body_at = stream.position();
                let body = stream.read_vec(length, ByteLen(64 << 20))?;
                let fields = walk(&body, body_at, desc)?.members().len();
                println!("{at}: {name} instance {instance}, {length} bytes, {fields} fields");
            }
            Event::Eof => println!("{at}: the end"),
            _ => {}
        }
    }
    Ok(())
}

fn ram_section(
    stream: &mut StreamReader<BufReader<File>>,
    records: &mut RecordReader,
) -> Result<(u64, u64), Box<dyn Error>> {
    let (mut pages, mut zeros) = (0, 0);
    loop {
        match records.next(stream)? {
            Record::MemSize { total } => {
                let mut listed = 0u64;
                while listed < total.0 {
                    let (name, length) = (stream.counted_string()?, stream.u64()?);
                    println!("  RAM block {name}, {length} bytes");
                    listed = listed.saturating_add(length);
                }
            }
            Record::Page { .. } => {
                stream.skip(ByteLen(PAGE_SIZE))?;
                pages += 1;
            }
            Record::Zero { .. } => zeros += 1,
            Record::EndOfSection => return Ok((pages, zeros)),
            other => return Err(format!("{other:?} in a plain stream").into()),
        }
    }
}
