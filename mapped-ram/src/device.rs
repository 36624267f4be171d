//! The state of a device.

use std::io;

use vmstate::{DeviceDesc, SectionEntry, SectionKind, Value, WalkError, walk};

use crate::Snapshot;

/// The state of one device, read from the file.
#[derive(Debug)]
pub struct Device<'a> {
    entry: &'a SectionEntry,
    desc: &'a DeviceDesc,
    body: Vec<u8>,
}

impl Device<'_> {
    /// Its section.
    #[must_use]
    pub fn entry(&self) -> &SectionEntry {
        self.entry
    }

    /// Its section without header and footer.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Its decoded state.
    ///
    /// # Errors
    /// If it is not what its description says.
    pub fn decode(&self) -> Result<Value<'_>, WalkError> {
        walk(&self.body, self.entry.body.start, self.desc)
    }
}

impl Snapshot {
    /// The first section of a device, found without a look at all of them.
    fn device_section(&self, name: &str, instance: u32) -> Option<&SectionEntry> {
        let key = |at: &usize| (self.sections[*at].name.as_str(), self.sections[*at].instance);
        let sorted = self.by_device.get_or_init(|| {
            let full = (0..self.sections.len()).filter(|at| self.sections[*at].kind == SectionKind::Full);
            let mut sorted: Vec<usize> = full.collect();
            sorted.sort_by_key(key);
            sorted
        });
        let first = sorted.get(sorted.partition_point(|at| key(at) < (name, instance)))?;
        (key(first) == (name, instance)).then(|| &self.sections[*first])
    }

    /// The state of a device; `None` if there is no such section, or it is not described.
    ///
    /// # Errors
    /// If it can't be [read](Snapshot::read).
    pub fn device(&self, name: &str, instance: u32) -> io::Result<Option<Device<'_>>> {
        let entry = self.device_section(name, instance);
        let desc = self.vmdesc.as_ref().and_then(|vmdesc| vmdesc.device(name, instance));
        let (Some(entry), Some(desc)) = (entry, desc) else {
            return Ok(None);
        };
        Ok(Some(Device { entry, desc, body: self.read(entry.body.clone())? }))
    }
}
