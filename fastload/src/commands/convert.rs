//! `fastload convert`: the same snapshot in another file.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mapped_ram::Snapshot;
use page_files::{FlatBlock, FlatFile, MappedRam};

use crate::commands::Failure;
use crate::flat::{self, Hole};
use crate::offset::Offset;
use crate::recognise::{self, Known};
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
    /// Flat memory of the same size that the input is a diff of: where the input has a hole, the page is taken from
    /// here. Of several, the oldest comes first.
    #[arg(long, value_name = "MEMORY", requires = "template")]
    base: Vec<PathBuf>,
    /// Take the holes of flat memory for zero pages, also where the template has content.
    #[arg(long, requires = "template")]
    holes_are_zero: bool,
    #[command(flatten)]
    offset: Offset,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
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
                let template = Offset::default().open(template)?;
                let source = self.flat(&template)?;
                rewrite::to_mapped_ram(Arc::new(source), &template, &self.output, self.json)?
            }
            None => {
                let snapshot = Arc::new(self.offset.open(&self.input)?);
                refuse_left_out(&snapshot)?;
                let source = MappedRam::new(Arc::clone(&snapshot))?;
                match self.to {
                    Format::MappedRam => rewrite::to_mapped_ram(Arc::new(source), &snapshot, &self.output, self.json)?,
                    Format::Flat => rewrite::to_flat(Arc::new(source), &self.output, self.json)?,
                }
            }
        };
        written.print(self.json)
    }

    /// The input as flat memory with the blocks of `template`, exactly.
    fn flat(&self, template: &Snapshot) -> Result<FlatFile, Failure> {
        let layout = template.layout();
        let blocks = FlatBlock::concatenated(layout.blocks().to_vec())?;
        let file = self.memory()?;
        let (size, total) = (file.metadata()?.len(), layout.total().0);
        if size != total {
            let (input, template) = (self.input.display(), template.path().display());
            let known = match recognise::at(&self.input) {
                Ok(Known::Other(what)) => format!("; {what}"),
                _ => String::new(),
            };
            return Err(
                format!("{input} has {size} bytes, but the RAM blocks of {template} have {total}{known}").into()
            );
        }
        if !self.holes_are_zero
            && let Some(hole) = flat::hole(&file, &blocks, template)?
        {
            return Err(self.doubtful(&hole, template).into());
        }
        Ok(FlatFile::from_file(file, &self.input, blocks)?)
    }

    /// The input, with what it is a diff of.
    fn memory(&self) -> Result<File, Failure> {
        for base in &self.base {
            rewrite::refuse_same(base, &self.output)?;
        }
        let layers: Vec<&Path> = self.base.iter().chain([&self.input]).map(PathBuf::as_path).collect();
        match layers.as_slice() {
            [input] => Ok(File::open(input).map_err(|error| format!("{}: {error}", input.display()))?),
            layers => flat::merge(layers, &self.output),
        }
    }

    fn doubtful(&self, hole: &Hole, template: &Snapshot) -> String {
        let Hole { block, page, holes, pages } = hole;
        format!(
            "{}: {holes} of its {pages} pages are holes, and {} has content where one is (RAM block \"{block}\", page \
             {}): it is a diff, perhaps, whose holes mean that nothing changed; name the memory that it is a diff of \
             with --base; if its holes are zero pages, say --holes-are-zero",
            self.input.display(),
            template.path().display(),
            page.0
        )
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
