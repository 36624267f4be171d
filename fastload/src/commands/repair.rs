//! `fastload repair`: bitmaps for files that QEMU wrote without.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use mapped_ram::{Snapshot, Warning};
use page_files::{FlatBlock, FlatFile};
use vmstate::{SectionKind, VmDesc};

use crate::commands::{Failure, convert};
use crate::offset::Offset;
use crate::{contents, rewrite};

/// Rebuild the bitmaps of a file that QEMU saved with background-snapshot and mapped-ram.
///
/// QEMU (seen in 10.0 to 11.1) then forgets to write the bitmaps, which say what pages are stored: a guest loaded from
/// the file finds its memory empty. The pages themselves are there. Every page that is not zero is marked as stored, in
/// a new file; the old one stays as it is.
///
/// An interrupted save looks almost the same, but misses the end of the stream. It is refused: its memory is a mixture
/// of different moments.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  fastload repair broken.snap good.snap && fastload check good.snap")]
pub(crate) struct Repair {
    /// The file without bitmaps.
    input: PathBuf,
    /// The file to write.
    output: PathBuf,
    #[command(flatten)]
    offset: Offset,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Repair {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        rewrite::refuse_same(&self.input, &self.output)?;
        let name = self.input.display();
        // Opening it reads the device sections, the end mark and the description, and fails if one is not whole.
        let snapshot = self.offset.open(&self.input).map_err(|error| format!("{error}: this can't be repaired"))?;
        if !snapshot.lacks_bitmaps() {
            return Err(format!("{name}: its bitmaps were written, there is nothing to repair").into());
        }
        convert::refuse_left_out(&snapshot)?;
        if let Some(missing) = missing_device(&snapshot) {
            return Err(format!("{name}: the state of device {missing} is missing: the save was interrupted").into());
        }
        let found = contents::diagnose(&snapshot)?;
        if !found.iter().any(|warning| matches!(warning, Warning::BitmapsAllZero { .. })) {
            return Err(format!("{name}: no page of it has any content, there is nothing to repair").into());
        }
        let blocks = snapshot.layout().iter().filter_map(|(id, block)| {
            let offset = snapshot.block(id)?.pages_offset;
            Some(FlatBlock { block: block.clone(), offset })
        });
        let source = FlatFile::open(&self.input, blocks.collect())?;
        let written = rewrite::to_mapped_ram(Arc::new(source), &snapshot, &self.output, self.json)?;
        written.print(self.json)
    }
}

/// A device that is described but has no section; or the lack of any.
fn missing_device(snapshot: &Snapshot) -> Option<String> {
    let sections = snapshot.sections().iter().filter(|section| section.kind == SectionKind::Full);
    let there: HashSet<(&str, u32)> = sections.map(|section| (section.name.as_str(), section.instance)).collect();
    let described = snapshot.vmdesc().map(VmDesc::devices).unwrap_or_default();
    if described.is_empty() {
        return Some("(any at all)".to_owned());
    }
    let missing = described.iter().find(|device| !there.contains(&(device.name.as_str(), device.instance)))?;
    Some(format!("\"{}\" {}", missing.name, missing.instance))
}
