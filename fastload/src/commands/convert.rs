//! `fastload convert`: the same snapshot in another file.

use std::path::PathBuf;
use std::sync::Arc;

use mapped_ram::{OpenErrorKind, Snapshot};
use page_files::{FlatBlock, FlatFile, MappedRam};

use crate::commands::Failure;
use crate::offset::Offset;
use crate::rewrite;

/// Write a snapshot again: as a clean mapped-ram file, as flat memory, or flat memory as mapped-ram.
///
/// What is zero becomes a hole; bytes that no longer belong to any page are left behind. The new file appears under its
/// name when it is complete and safe on the disk, replacing what was there, or not at all.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  fastload convert old.snap new.snap                      the same snapshot, without stale bytes, at offset 0
  fastload convert big.file new.snap --offset 2M          of a snapshot that begins behind 2 MiB of something else
  fastload convert vm.snap memory --to flat               all RAM blocks, one after the other; prints their offsets
  fastload convert memory vm.snap --template old.snap     flat memory back into a file that QEMU loads, with the
                                                          machine type, RAM blocks and device state of old.snap")]
pub(crate) struct Convert {
    /// The file to read: mapped-ram, or flat memory if there is a template.
    input: PathBuf,
    /// The file to write.
    output: PathBuf,
    /// The format to write.
    #[arg(long, value_enum, default_value_t = Format::MappedRam)]
    to: Format,
    /// A mapped-ram file. The input is then flat memory: the template's RAM blocks, one after the other.
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "offset")]
    template: Option<PathBuf>,
    #[command(flatten)]
    offset: Offset,
    /// Print JSON, and no progress bar.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// QEMU's snapshot files with pages at fixed offsets.
    MappedRam,
    /// Nothing but memory.
    Flat,
}

impl Convert {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        rewrite::refuse_same(&self.input, &self.output)?;
        let written = match &self.template {
            Some(_) if self.to == Format::Flat => {
                return Err("--template is for writing mapped-ram from flat memory, and --to flat is not".into());
            }
            Some(template) => {
                rewrite::refuse_same(template, &self.output)?;
                let template = Snapshot::open(template)?;
                let source = self.flat(&template)?;
                rewrite::to_mapped_ram(&source, &template, &self.output, self.json)?
            }
            None => {
                let snapshot = Arc::new(self.snapshot()?);
                refuse_left_out(&snapshot)?;
                let source = MappedRam::new(Arc::clone(&snapshot))?;
                match self.to {
                    Format::MappedRam => rewrite::to_mapped_ram(&source, &snapshot, &self.output, self.json)?,
                    Format::Flat => rewrite::to_flat(&source, &self.output, self.json)?,
                }
            }
        };
        written.print(self.json)
    }

    fn snapshot(&self) -> Result<Snapshot, Failure> {
        self.offset.open(&self.input).map_err(|error| match error.kind {
            OpenErrorKind::NotAStream { .. } => {
                format!("{error}; if it is flat memory, name a --template for the rest of the snapshot").into()
            }
            _ => error.into(),
        })
    }

    /// The input as flat memory with the blocks of `template`, exactly.
    fn flat(&self, template: &Snapshot) -> Result<FlatFile, Failure> {
        let layout = template.layout();
        let source = FlatFile::open(&self.input, FlatBlock::concatenated(layout.blocks().to_vec())?)?;
        let meta = std::fs::metadata(&self.input).map_err(|error| format!("{}: {error}", self.input.display()))?;
        let (size, total) = (meta.len(), layout.total().0);
        if size != total {
            let (input, template) = (self.input.display(), template.path().display());
            return Err(format!("{input} has {size} bytes, but the RAM blocks of {template} have {total}").into());
        }
        Ok(source)
    }
}

/// A file that does not have all of RAM can't be made into one that does.
pub(crate) fn refuse_left_out(snapshot: &Snapshot) -> Result<(), Failure> {
    let left_out = snapshot.layout().iter().find(|(id, _)| snapshot.block(*id).is_some_and(|block| !block.in_file));
    match left_out {
        Some((_, block)) => {
            let (path, name) = (snapshot.path().display(), block.name());
            Err(format!("{path}: the content of RAM block \"{name}\" is not in the file (x-ignore-shared)").into())
        }
        None => Ok(()),
    }
}
