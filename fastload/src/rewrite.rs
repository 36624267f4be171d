//! What the commands share that write one file from another.

use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use mapped_ram::{Snapshot, Writer};
use page_files::{FlatBlock, FlatSink, MappedRamSink};
use page_source::{PageSink, PageSource, Progress, PumpError, PumpOptions, Pumped, pump};
use page_units::{FileOffset, Layout};
use serde::Serialize;
use vmstate::SectionKind;

use crate::commands::Failure;
use crate::event::Event;
use crate::screen;
use crate::{contents, output};

/// What was written.
#[derive(Debug, Serialize)]
pub(crate) struct Written {
    #[serde(skip)]
    output: PathBuf,
    format: &'static str,
    machine: Option<String>,
    ram_bytes: u64,
    stored_pages: u64,
    zero_pages: u64,
    device_state_bytes: u64,
    blocks: Vec<Place>,
}

/// A RAM block in the file that was written.
#[derive(Debug, Serialize)]
struct Place {
    name: String,
    length: u64,
    offset: u64,
}

impl Written {
    /// Tells the user.
    pub(crate) fn print(&self, json: bool) -> Result<(), Failure> {
        if json {
            return Ok(Event::new("complete").path("output", &self.output).with(self).print()?);
        }
        let mut text = String::new();
        let Written { format, stored_pages, zero_pages, .. } = self;
        let (output, ram) = (self.output.display(), output::size(self.ram_bytes));
        writeln!(text, "{output}: {format}, {ram} of RAM, {stored_pages} pages stored, {zero_pages} zero")?;
        for block in &self.blocks {
            writeln!(text, "  {:#014x}  {:>10}  {}", block.offset, output::size(block.length), block.name)?;
        }
        Ok(output::print(&text)?)
    }
}

/// Writes what `source` has as a mapped-ram file, with the configuration and the device state of `template`.
pub(crate) fn to_mapped_ram(
    source: Arc<dyn PageSource>,
    template: &Snapshot,
    output: &Path,
    json: bool,
) -> Result<Written, Failure> {
    let name = template.path().display();
    let ram = template.sections().iter().position(|section| section.kind == SectionKind::Start);
    let early = template.sections()[..ram.unwrap_or(0)].iter().find(|section| section.kind == SectionKind::Full);
    if let Some(early) = early {
        return Err(
            format!("{name}: device section \"{}\" comes before RAM, which can't be rewritten", early.name).into()
        );
    }
    let device_state = contents::read(template, template.tail())?;
    // All that is taken of the template is in memory now; the source looks after its own file.
    if let Some(what) = contents::changed(template)? {
        return Err(format!("{name}: {what} changed while it was read").into());
    }
    let writer = Writer::create(output, template.configuration(), source.layout().clone())?;
    let offsets = source.layout().runs().map(|run| writer.data_offset(run).unwrap_or_default());
    let blocks = places(source.layout(), offsets);
    let machine = Some(writer.machine().to_owned());
    let device_state_bytes = device_state.len() as u64;
    let sink = Arc::new(MappedRamSink::new(writer));
    let pumped = pump_with_bar(Arc::clone(&source), Arc::clone(&sink) as Arc<dyn PageSink>, json)?;
    sink.publish(&device_state)?;
    Ok(written(output, "mapped-ram", machine, source.layout(), pumped, device_state_bytes, blocks))
}

/// Writes what `source` has as a flat file, one block after the other.
pub(crate) fn to_flat(source: Arc<dyn PageSource>, output: &Path, json: bool) -> Result<Written, Failure> {
    let blocks = FlatBlock::concatenated(source.layout().blocks().to_vec())?;
    let sink = Arc::new(FlatSink::create(output, &blocks)?);
    let pumped = pump_with_bar(Arc::clone(&source), Arc::clone(&sink) as Arc<dyn PageSink>, json)?;
    sink.publish()?;
    let blocks = places(source.layout(), blocks.iter().map(|block| block.offset));
    Ok(written(output, "flat", None, source.layout(), pumped, 0, blocks))
}

/// [`pump`], telling how far it is, to people or to programs.
pub(crate) fn pump_with_bar(
    source: Arc<dyn PageSource>,
    sink: Arc<dyn PageSink>,
    json: bool,
) -> Result<Pumped, PumpError> {
    let shown = screen::Progress::new(source.layout().total().0, json);
    let progress = |progress: Progress| shown.set(progress.done.to_bytes().0);
    let threads = thread::available_parallelism().map_or(1, |threads| threads.get().min(4));
    let options = PumpOptions { threads, find_zeros: true, progress: Some(&progress), ..PumpOptions::default() };
    pump(source, sink, &options)
}

/// Refuses to write a file over one that is read.
pub(crate) fn refuse_same(input: &Path, output: &Path) -> Result<(), Failure> {
    let inode = |path: &Path| std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    match (inode(input), inode(output)) {
        (Some(input_inode), Some(output_inode)) if input_inode == output_inode => {
            Err(format!("{} and {} are the same file", input.display(), output.display()).into())
        }
        _ => Ok(()),
    }
}

fn places(layout: &Layout, offsets: impl Iterator<Item = FileOffset>) -> Vec<Place> {
    let blocks = layout.blocks().iter().zip(offsets);
    let place = |block: &page_units::RamBlock, offset: FileOffset| Place {
        name: block.name().to_owned(),
        length: block.length().0,
        offset: offset.0,
    };
    blocks.map(|(block, offset)| place(block, offset)).collect()
}

fn written(
    output: &Path,
    format: &'static str,
    machine: Option<String>,
    layout: &Layout,
    pumped: Pumped,
    device_state_bytes: u64,
    blocks: Vec<Place>,
) -> Written {
    Written {
        output: output.to_owned(),
        format,
        machine,
        ram_bytes: layout.total().0,
        stored_pages: pumped.stored.0,
        zero_pages: pumped.zero.0,
        device_state_bytes,
        blocks,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::FileExt;

    use page_files::FlatFile;
    use page_source::{Feed, Pages, SourceError, Span};
    use page_units::PageRun;
    use testkit::samples;

    use super::*;

    /// Flat memory; when its pages are asked for, somebody writes to the template.
    #[derive(Debug)]
    struct Meddler(FlatFile, PathBuf);

    impl Pages for Meddler {
        fn layout(&self) -> &Layout {
            self.0.layout()
        }

        fn content(&self, run: PageRun) -> Span {
            self.0.content(run)
        }
    }

    impl PageSource for Meddler {
        fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
            meddle(&self.1);
            self.0.start(sink)
        }
    }

    /// Writes what is there already.
    fn meddle(path: &Path) {
        let file = OpenOptions::new().write(true).read(true).open(path).unwrap();
        file.write_all_at(b"Q", 0).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    }

    #[test]
    fn a_template_that_changes_never_gives_both_an_error_and_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let sample = samples::stripped().into_iter().find(|sample| sample.name.contains("pc-32-plain")).unwrap();
        let path = sample.unpack(dir.path()).unwrap();
        let (flat, output) = (dir.path().join("flat"), dir.path().join("output"));
        let template = Snapshot::open(&path).unwrap();
        fs::File::create(&flat).unwrap().set_len(template.layout().total().0).unwrap();
        let blocks = FlatBlock::concatenated(template.layout().blocks().to_vec()).unwrap();
        let source: Arc<dyn PageSource> = Arc::new(Meddler(FlatFile::open(&flat, blocks).unwrap(), path.clone()));
        // It changes while pages are copied: its part was read before.
        let written = to_mapped_ram(Arc::clone(&source), &template, &output, true);
        assert_eq!(written.is_ok(), output.exists(), "{:?}", written.err().map(|error| error.to_string()));
        let _ = fs::remove_file(&output);
        // It has changed before: nothing is written.
        let failed = to_mapped_ram(Arc::clone(&source), &template, &output, true).unwrap_err().to_string();
        assert!(failed.contains("changed") && failed.starts_with(&path.display().to_string()), "{failed}");
        assert!(!output.exists());
    }
}
