//! The device state of a stream of our own.

use crate::{Event, Section, SectionHeader, StreamWriter, WriteError};

/// Writes sections as the device state of a stream: each with header and footer, then the end of the stream, then
/// the description of all of them.
#[derive(Debug)]
pub struct DeviceWriter {
    first_id: u32,
    sections: Vec<Section>,
}

impl DeviceWriter {
    /// A writer that numbers its sections from `first_id` on; a stream's other sections must not have those numbers.
    #[must_use]
    pub fn new(first_id: u32) -> DeviceWriter {
        DeviceWriter { first_id, sections: Vec::new() }
    }

    /// Adds a section. (Name, instance) must not repeat.
    pub fn push(&mut self, section: Section) {
        self.sections.push(section);
    }

    /// The bytes: sections, end of the stream, description. `machine` is the machine type of the stream's
    /// configuration, which the description repeats.
    ///
    /// # Errors
    /// If they are too many or too long for the stream.
    pub fn finish(&self, machine: &str) -> Result<Vec<u8>, WriteError> {
        let mut out = StreamWriter::new(Vec::new());
        for (id, section) in (self.first_id..).zip(&self.sections) {
            let (name, instance, version) = (section.name().to_owned(), section.instance(), section.version());
            out.event(&Event::SectionFull(SectionHeader { id, name, instance, version }))?;
            out.bytes(section.body())?;
            out.event(&Event::Footer { id })?;
        }
        out.event(&Event::Eof)?;
        out.event(&Event::VmDesc(describe(machine, &self.sections).into_bytes()))?;
        Ok(out.into_inner())
    }
}

/// The description as QEMU writes it.
pub(crate) fn describe<'a>(machine: &str, sections: impl IntoIterator<Item = &'a Section>) -> String {
    let devices: Vec<&str> = sections.into_iter().map(Section::description).collect();
    // Without the blanks that QEMU puts in: the text is read for each restore.
    format!(
        "{{\"configuration\":{{\"vmsd_name\":\"configuration\",\"version\":1,\"fields\":\
         [{{\"name\":\"len\",\"type\":\"uint32\",\"size\":4}},\
         {{\"name\":\"name\",\"type\":\"buffer\",\"size\":{}}}]}},\
         \"page_size\":4096,\"devices\":[{}]}}",
        machine.len(),
        devices.join(",")
    )
}
