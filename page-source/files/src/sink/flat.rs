//! Writing flat memory files.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError};
use page_units::{FileOffset, Layout, LayoutError, PageRun};
use parking_lot::Mutex;
use whole_file::{WholeFile, WholeFileError};

use super::outcome::Outcome;
use crate::FlatBlock;

/// Writes a flat memory file, with holes for what is zero.
///
/// It is a [`WholeFile`]: it gets its name when it is [published](FlatSink::publish), after it was synchronised to the disk,
/// and replaces what was there. Otherwise it vanishes when the sink is dropped. Pages may come from any number of threads.
#[derive(Debug)]
pub struct FlatSink {
    path: PathBuf,
    layout: Layout,
    bases: Vec<FileOffset>,
    file: File,
    unpublished: Mutex<Option<WholeFile>>,
    outcome: Outcome,
}

impl FlatSink {
    /// Begins to write the file that is to be at `path`, with these blocks.
    ///
    /// # Errors
    /// If it can't be created, or the blocks do not fit a file.
    pub fn create(path: impl AsRef<Path>, blocks: &[FlatBlock]) -> Result<FlatSink, SinkError> {
        let path = path.as_ref().to_owned();
        let wrong = |error: io::Error| write_error(&path, FileOffset(0), error);
        let unfit = |error: LayoutError| wrong(io::Error::new(io::ErrorKind::InvalidInput, error));
        let layout = Layout::new(blocks.iter().map(|block| block.block.clone()).collect()).map_err(unfit)?;
        let bases = blocks.iter().map(|block| block.offset).collect();
        let mut size = FileOffset(0);
        for block in blocks {
            let end = block.offset.checked_add(block.block.length()).ok_or(LayoutError::TooLarge).map_err(unfit)?;
            size = size.max(end);
        }
        let unpublished = WholeFile::create(&path).map_err(unmade)?;
        let file = unpublished.file().try_clone().map_err(wrong)?;
        file.set_len(size.0).map_err(wrong)?;
        let unpublished = Mutex::new(Some(unpublished));
        Ok(FlatSink { path, layout, bases, file, unpublished, outcome: Outcome::default() })
    }

    /// Makes the file durable and gives it its name: once the flow has ended with [`End::Complete`].
    ///
    /// # Errors
    /// If it has not, or that fails. There is no file then, or the one that was there before.
    pub fn publish(&self) -> Result<(), SinkError> {
        self.outcome.publish(|| match self.unpublished.lock().take() {
            Some(file) => file.publish().map_err(unmade),
            None => Err(SinkError::stopped("it was published before")),
        })
    }

    fn no_place(&self, run: PageRun) -> Reply {
        self.outcome.fail(SinkError::stopped(format_args!("{run}, which the file has no place for"))).into()
    }
}

impl PageSink for FlatSink {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        if !self.layout.contains(run) || bytes.len() != run.len() {
            return self.no_place(run);
        }
        let offset = self.bases[run.block.0 as usize] + run.first.byte_offset();
        match bytes.write_to(&self.file, offset) {
            Ok(()) => Reply::Taken,
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Reply::Unreadable(run),
            Err(error) => self.outcome.fail(write_error(&self.path, offset, error)).into(),
        }
    }

    fn zero(&self, run: PageRun) -> Reply {
        if self.layout.contains(run) { Reply::Taken } else { self.no_place(run) }
    }

    fn absent(&self, run: PageRun) -> Reply {
        self.outcome.absent(run).into()
    }

    fn failed(&self, _: PageRun, error: SourceError) -> Reply {
        self.outcome.lacks(error).into()
    }

    fn end(&self, end: End) {
        self.outcome.end(end);
    }
}

/// That writing the file for `path` failed.
fn write_error(path: &Path, offset: FileOffset, error: io::Error) -> SinkError {
    SinkError::Write { target: path.display().to_string(), offset, error: Arc::new(error) }
}

fn unmade(error: WholeFileError) -> SinkError {
    SinkError::File(Arc::new(error))
}
