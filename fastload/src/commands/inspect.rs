//! `fastload inspect`: what is in a snapshot file.

mod diff;
mod report;
mod tree;

use std::path::{Path, PathBuf};

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
  fastload inspect vm.snap
      Machine type, RAM blocks, device sections, warnings
  fastload inspect vm.snap --json | jq .blocks
  fastload inspect vm.snap --device cpu
      The decoded state of every section \"cpu\"
  fastload inspect --diff a.snap b.snap
      Which pages and which device fields differ
  fastload inspect vm.snap --offset 0x1000
      The stream begins behind a header of 4096 bytes (found by itself if it is in the first MiB)")]
pub(crate) struct Inspect {
    /// A file that QEMU saved with the capability mapped-ram.
    file: PathBuf,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Print the decoded state of the device sections of this name, e.g. `cpu` or `0000:00:02.0/virtio-net`.
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Show in what the file differs from this one: pages, and fields of devices.
    #[arg(long, value_name = "OTHER", conflicts_with_all = ["device", "offset"])]
    diff: Option<PathBuf>,
    #[command(flatten)]
    offset: Offset,
}

impl Inspect {
    fn diff(&self, one: &Path, other: &Path) -> Result<(), Failure> {
        let diff = diff::Diff::of(&Offset::default().open(one)?, &Offset::default().open(other)?)?;
        if self.json {
            return Ok(Event::new("complete").path("file", one).path("other", other).with(diff).print()?);
        }
        Ok(output::print(&diff.text()?)?)
    }

    pub(crate) fn run(&self) -> Result<(), Failure> {
        let snapshot = self.offset.open_damaged(&self.file)?;
        if let Some(other) = &self.diff {
            // The first of the two on the command line comes first.
            return self.diff(other, &self.file);
        }
        let complete = || Event::new("complete").path("file", &self.file);
        match &self.device {
            Some(name) if self.json => complete().value("devices", tree::values(&snapshot, name)?.into()).print()?,
            Some(name) => output::print(&tree::text(&snapshot, name)?)?,
            None if self.json => complete().with(report::Report::of(&snapshot)?).print()?,
            None => output::print(&report::Report::of(&snapshot)?.text())?,
        }
        Ok(())
    }
}
