//! What the destination gets before the first page.

use page_units::{ByteLen, Layout, PAGE_SIZE};
use vmstate::{Command, Configuration, Event, MAPPED_RAM, SectionHeader, StreamWriter, WriteError};

use super::ServeError;
use crate::wire::record;

/// PING before anything else: its PONG says that the return path is open.
pub(super) const PING_OPEN: u32 = 1;
/// PING behind the devices in the package: its PONG says that they are loaded.
pub(super) const PING_LOADED: u32 = 3;
/// The number of our RAM section: neither 0, which QEMU's loader takes for "not loaded yet", nor one that a device in
/// a real file has.
const RAM_SECTION: u32 = 0x7261_6d31;

/// The state of a guest without its memory, cut out of a snapshot.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The configuration as the snapshot has it. `mapped-ram` is dropped on the way.
    pub configuration: Configuration,
    /// Sections of devices that come before RAM, with headers and footers, as they are in the snapshot; mostly none.
    pub early: Vec<u8>,
    /// The FULL sections of all other devices, with headers and footers, as they are in the snapshot.
    pub devices: Vec<u8>,
}

impl Opening {
    /// Everything up to the package.
    pub(super) fn head(&self, layout: &Layout) -> Result<Vec<u8>, ServeError> {
        self.encode_head(layout).map_err(encode)
    }

    /// The command with the package: the devices, and the order to start the guest.
    pub(super) fn package(&self) -> Result<Vec<u8>, ServeError> {
        self.encode_package().map_err(encode)
    }

    fn encode_head(&self, layout: &Layout) -> Result<Vec<u8>, WriteError> {
        let mut out = StreamWriter::new(Vec::new());
        out.event(&Event::Header)?;
        out.event(&Event::Configuration(self.configuration.without_capability(MAPPED_RAM)))?;
        out.command(&Command::OpenReturnPath)?;
        out.command(&Command::Ping(PING_OPEN))?;
        let page_sizes = layout.blocks().iter().fold(0, |all, block| all | block.page_size().bytes().0);
        out.command(&Command::PostcopyAdvise { page_sizes, target_page_size: PAGE_SIZE })?;
        out.bytes(&self.early)?;
        let header = SectionHeader { id: RAM_SECTION, name: "ram".into(), instance: 0, version: 4 };
        out.event(&Event::SectionStart(header))?;
        out.u64(layout.total().0 | record::MEM_SIZE)?;
        for block in layout.blocks() {
            out.counted_string(block.name())?;
            out.u64(block.length().0)?;
            if block.page_size().bytes().0 != PAGE_SIZE {
                out.u64(block.page_size().bytes().0)?;
            }
        }
        out.u64(record::END)?;
        out.event(&Event::Footer { id: RAM_SECTION })?;
        // ADVISE has dropped all memory already. But without any discard, LISTEN puts QEMU (10.0 to 11.1) into a
        // state in which it loads pages as if there were no postcopy, and hangs.
        if let Some(block) = layout.blocks().iter().find(|block| block.length().0 > 0) {
            let ranges = vec![(ByteLen(0), block.page_size().bytes())];
            out.command(&Command::PostcopyRamDiscard { block: block.name().to_owned(), ranges })?;
        }
        Ok(out.into_inner())
    }

    fn encode_package(&self) -> Result<Vec<u8>, WriteError> {
        let mut package = StreamWriter::new(Vec::with_capacity(self.devices.len() + 64));
        package.command(&Command::PostcopyListen)?;
        package.bytes(&self.devices)?;
        package.command(&Command::Ping(PING_LOADED))?;
        package.command(&Command::PostcopyRun)?;
        let package = package.into_inner();
        let Ok(length) = u32::try_from(package.len()) else {
            return Err(WriteError::TooLong { what: "the device state", length: ByteLen::of(package.len()) });
        };
        let mut out = StreamWriter::new(Vec::with_capacity(package.len() + 16));
        out.command(&Command::Packaged { length })?;
        out.bytes(&package)?;
        Ok(out.into_inner())
    }
}

pub(super) fn encode(error: WriteError) -> ServeError {
    ServeError::Encode { reason: error.to_string() }
}

/// Commands, encoded.
pub(super) fn commands(list: &[Command]) -> Result<Vec<u8>, ServeError> {
    let mut out = StreamWriter::new(Vec::new());
    list.iter().try_for_each(|command| out.command(command)).map_err(encode)?;
    Ok(out.into_inner())
}

/// A PART of the RAM section begins.
pub(super) fn begin_part(to: &mut Vec<u8>) {
    to.push(vmstate::kind::PART);
    to.extend_from_slice(&RAM_SECTION.to_be_bytes());
}

/// A section of RAM ends.
pub(super) fn end_part(to: &mut Vec<u8>) {
    to.extend_from_slice(&record::END.to_be_bytes());
    to.push(vmstate::kind::FOOTER);
    to.extend_from_slice(&RAM_SECTION.to_be_bytes());
}

/// The END of the RAM section, and of the stream.
pub(super) fn end_of_stream() -> Vec<u8> {
    let mut end = vec![vmstate::kind::END];
    end.extend_from_slice(&RAM_SECTION.to_be_bytes());
    end_part(&mut end);
    end.push(vmstate::kind::EOF);
    end
}
