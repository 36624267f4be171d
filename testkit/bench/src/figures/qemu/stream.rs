//! A whole snapshot as one postcopy stream, ready in memory: all that a QEMU's loader has to wait for is itself.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use mapped_ram::Snapshot;
use page_source::is_zero;
use page_units::{ByteLen, PageIndex};
use qemu_pages::wire::record;
use serde_json::json;
use vmstate::{Command, Event, MAPPED_RAM, SectionHeader, StreamWriter, kind};

use super::super::Measured;
use super::image::Image;
use crate::sys::PAGE;

/// The number of the RAM section.
const RAM: u32 = 0x6265_6e63;
/// What follows the devices; its PONG says that they are loaded.
const LOADED: u32 = 3;

pub(super) struct Stream {
    /// All but the end, which has to wait until the devices are loaded.
    body: Vec<u8>,
    end: Vec<u8>,
}

impl Stream {
    pub(super) fn of(path: &Path) -> Measured<Stream> {
        let snapshot = Snapshot::open(path)?;
        let mut body = opening(&snapshot)?;
        let (mut zeros, mut stored) = (Vec::new(), Vec::new());
        let mut page = vec![0; PAGE];
        let (mut last_zero, mut last_stored) = (None, None);
        for (id, block) in snapshot.layout().iter() {
            let file = snapshot.block(id).ok_or("a block without a place")?;
            for index in 0..block.pages().0 {
                snapshot.read_exact_at(&mut page, page_units::FileOffset(file.pages_offset.0 + index * PAGE as u64))?;
                if is_zero(&page) {
                    record::push_zero(&mut zeros, block.name(), PageIndex(index), last_zero == Some(id));
                    last_zero = Some(id);
                } else {
                    record::push_page(&mut stored, block.name(), PageIndex(index), last_stored == Some(id), &page);
                    last_stored = Some(id);
                }
            }
        }
        // The few zero pages first, since devices may look at them while they are loaded.
        for records in [zeros, stored] {
            body.push(kind::PART);
            body.extend_from_slice(&RAM.to_be_bytes());
            body.extend(records);
            end_section(&mut body);
        }
        let mut end = vec![kind::END];
        end.extend_from_slice(&RAM.to_be_bytes());
        end_section(&mut end);
        end.push(kind::EOF);
        Ok(Stream { body, end })
    }

    /// Sends it to a QEMU. Bytes a second, from connecting until it says that it has everything.
    pub(super) fn sent(&self, image: &Image) -> Measured<f64> {
        let warm = image.warm()?;
        let mut qemu = image.waiting()?;
        drop(warm);
        let path = qemu.dir().join("incoming");
        qemu.set_capabilities(&[("postcopy-ram", true)])?;
        qemu.execute("migrate-incoming", json!({"uri": format!("unix:{}", path.display())}))?;
        let begun = Instant::now();
        let mut socket = UnixStream::connect(&path)?;
        let served = self.send(&mut socket);
        served.map_err(|error| format!("{error}; QEMU says: {}", qemu.stderr()))?;
        Ok((self.body.len() + self.end.len()) as f64 / begun.elapsed().as_secs_f64())
    }

    fn send(&self, socket: &mut UnixStream) -> io::Result<()> {
        socket.write_all(&self.body)?;
        wait_for(socket, 2, LOADED)?;
        socket.write_all(&self.end)?;
        wait_for(socket, 1, 0)
    }
}

/// Everything before the pages, as QEMU's own source sends it (migration/savevm.c).
fn opening(snapshot: &Snapshot) -> Measured<Vec<u8>> {
    let layout = snapshot.layout();
    let mut out = StreamWriter::new(Vec::new());
    out.event(&Event::Header)?;
    out.event(&Event::Configuration(snapshot.configuration().without_capability(MAPPED_RAM)))?;
    out.command(&Command::OpenReturnPath)?;
    out.command(&Command::PostcopyAdvise { page_sizes: PAGE as u64, target_page_size: PAGE as u64 })?;
    out.event(&Event::SectionStart(SectionHeader { id: RAM, name: "ram".into(), instance: 0, version: 4 }))?;
    out.u64(layout.total().0 | record::MEM_SIZE)?;
    for block in layout.blocks() {
        out.counted_string(block.name())?;
        out.u64(block.length().0)?;
    }
    end_section(out.get_mut());
    let first = layout.blocks().first().ok_or("no RAM")?.name().to_owned();
    out.command(&Command::PostcopyRamDiscard { block: first, ranges: vec![(ByteLen(0), ByteLen(PAGE as u64))] })?;
    let mut package = StreamWriter::new(Vec::new());
    package.command(&Command::PostcopyListen)?;
    package.bytes(&snapshot.read(snapshot.device_state())?)?;
    package.command(&Command::Ping(LOADED))?;
    package.command(&Command::PostcopyRun)?;
    let package = package.into_inner();
    out.command(&Command::Packaged { length: u32::try_from(package.len())? })?;
    out.bytes(&package)?;
    Ok(out.into_inner())
}

fn end_section(to: &mut Vec<u8>) {
    to.extend_from_slice(&record::END.to_be_bytes());
    to.push(kind::FOOTER);
    to.extend_from_slice(&RAM.to_be_bytes());
}

/// Reads what the destination says up to this message. What it asks for is under way already.
fn wait_for(socket: &mut UnixStream, wanted: u16, value: u32) -> io::Result<()> {
    loop {
        let mut header = [0; 4];
        socket.read_exact(&mut header)?;
        let [kind, length] = [0, 2].map(|at| u16::from_be_bytes([header[at], header[at + 1]]));
        let mut payload = vec![0; length.into()];
        socket.read_exact(&mut payload)?;
        if kind == wanted && payload == value.to_be_bytes() {
            return Ok(());
        }
        if kind == 1 {
            return Err(io::Error::other(format!("QEMU gave up: {payload:?}")));
        }
    }
}
