//! What a migration stream consists of.

use std::ops::Range;

use page_units::FileOffset;

use crate::{Configuration, RawCommand};

/// "QEVM".
pub const MAGIC: u32 = 0x5145_564d;
/// The version of the stream that every QEMU since 0.13 writes.
pub const VERSION: u32 = 3;

/// The byte that begins each part of a stream (QEMU `migration/savevm.h`, `QEMU_VM_*`).
pub mod kind {
    /// End of the sections.
    pub const EOF: u8 = 0x00;
    /// First section of a device that is saved in several.
    pub const START: u8 = 0x01;
    /// A further one.
    pub const PART: u8 = 0x02;
    /// The last one.
    pub const END: u8 = 0x03;
    /// The only section of a device.
    pub const FULL: u8 = 0x04;
    /// A subsection, inside the configuration or a device.
    pub const SUBSECTION: u8 = 0x05;
    /// The description of the devices' state.
    pub const VMDESCRIPTION: u8 = 0x06;
    /// Machine type and what else has to agree.
    pub const CONFIGURATION: u8 = 0x07;
    /// A command to the destination.
    pub const COMMAND: u8 = 0x08;
    /// The end of a section.
    pub const FOOTER: u8 = 0x7e;
}

/// The header of a START or FULL section.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SectionHeader {
    /// The number that PART, END and the footer repeat.
    pub id: u32,
    /// Whose state it is, e.g. `ram` or `0000:00:02.0/virtio-net`.
    pub name: String,
    /// Which one of that name.
    pub instance: u32,
    /// The version of its encoding.
    pub version: u32,
}

/// One part of a migration stream. A section comes as its header, then its body, which the consumer reads itself
/// (nothing in the stream tells how long it is), then [`Footer`](Event::Footer).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The magic number and the version of the stream.
    Header,
    /// Machine type, capabilities and what else must agree.
    Configuration(Configuration),
    /// A command. [`PACKAGED`](crate::Command::Packaged) is followed by as many bytes as it says: a nested stream.
    Command(RawCommand),
    /// The first section of a device that is saved in several; its body follows.
    SectionStart(SectionHeader),
    /// A further one; its body follows.
    SectionPart {
        /// The section.
        id: u32,
    },
    /// The last one; its body follows.
    SectionEnd {
        /// The section.
        id: u32,
    },
    /// The only section of a device; its body follows.
    SectionFull(SectionHeader),
    /// The end of a section.
    Footer {
        /// The section.
        id: u32,
    },
    /// No more sections.
    Eof,
    /// The description of the devices' state: JSON as it is in the stream (see [`VmDesc`](crate::VmDesc)).
    VmDesc(Vec<u8>),
}

/// Something and the bytes it occupies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// What.
    pub value: T,
    /// Where in the file.
    pub range: Range<FileOffset>,
}
