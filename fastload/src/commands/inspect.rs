//! `fastload inspect`: what is in a snapshot file.

mod report;
mod tree;

use std::path::PathBuf;

use serde_json::json;

use crate::commands::Failure;
use crate::event::Event;
use crate::offset::Offset;
use crate::output;

/// Show what is in a snapshot file.
///
/// Reads the description of the snapshot and its bitmaps, not its RAM. Files that are damaged are shown as far as they
/// can be read, with warnings.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  fastload inspect vm.snap                    machine type, RAM blocks, device sections, warnings
  fastload inspect vm.snap --json | jq .blocks
  fastload inspect vm.snap --device cpu       the decoded state of every section \"cpu\"
  fastload inspect vm.snap --offset 0x1000    the stream begins behind a header of 4096 bytes
                                              (found by itself if it is in the first MiB)")]
pub(crate) struct Inspect {
    /// A file that QEMU saved with the capability mapped-ram.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print the decoded state of the device sections of this name, e.g. `cpu` or `0000:00:02.0/virtio-net`.
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    #[command(flatten)]
    offset: Offset,
}

impl Inspect {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let snapshot = self.offset.open_damaged(&self.file)?;
        let complete = || Event::new("complete").path("file", &self.file);
        match &self.device {
            Some(name) if self.json => complete().with(json!({ "devices": tree::values(&snapshot, name)? })).print()?,
            Some(name) => output::print(&tree::text(&snapshot, name)?)?,
            None if self.json => complete().with(report::Report::of(&snapshot)?).print()?,
            None => output::print(&report::Report::of(&snapshot)?.text())?,
        }
        Ok(())
    }
}
