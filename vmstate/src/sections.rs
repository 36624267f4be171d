//! The table of a stream's sections.

use std::fmt;
use std::ops::Range;

use page_units::FileOffset;

/// What kind of part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// The first section of a device that is saved in several.
    Start,
    /// A further one.
    Part,
    /// The last one.
    End,
    /// The only section of a device.
    Full,
    /// A command to the destination.
    Command,
}

/// A section (or command) and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionEntry {
    /// What it is.
    pub kind: SectionKind,
    /// The number of the section; of a command, its number.
    pub id: u32,
    /// Whose state it is; empty for a command.
    pub name: String,
    /// Which one of that name; 0 where the stream does not tell.
    pub instance: u32,
    /// The version of its encoding; 0 where the stream does not tell.
    pub version: u32,
    /// From its first byte to after its footer.
    pub range: Range<FileOffset>,
    /// The same without header and footer.
    pub body: Range<FileOffset>,
}

impl fmt::Display for SectionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SectionKind::Start => "START",
            SectionKind::Part => "PART",
            SectionKind::End => "END",
            SectionKind::Full => "FULL",
            SectionKind::Command => "CMD",
        })
    }
}
