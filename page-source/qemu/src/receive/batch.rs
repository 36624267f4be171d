//! Pages that follow on each other, told to the sink together.

use std::io::Read;

use page_source::{PageBytes, PageSink, Reply, SourceError, SourceErrorKind, Subject, is_zero};
use page_units::{BlockId, PAGE_SHIFT, PageCount, PageIndex, PageRun};
use vmstate::StreamReader;

use super::error::ReadError;

/// The most that is collected: 1 MiB.
const MOST: usize = 256 * PAGE;
/// A page in memory.
const PAGE: usize = 1 << PAGE_SHIFT;

/// What was read and not told yet.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    sink: &'a dyn PageSink,
    run: PageRun,
    /// The content of the run; empty if it is all zero.
    bytes: Vec<u8>,
    pub(super) stored: PageCount,
}

impl<'a> Batch<'a> {
    pub(super) fn new(sink: &'a dyn PageSink) -> Batch<'a> {
        let run = PageRun::new(BlockId(0), PageIndex(0), PageCount(0));
        Batch { sink, run, bytes: Vec::with_capacity(MOST), stored: PageCount(0) }
    }

    /// A page whose content comes next.
    pub(super) fn page<R: Read>(
        &mut self,
        block: BlockId,
        page: PageIndex,
        from: &mut StreamReader<R>,
    ) -> Result<(), ReadError> {
        if !self.continues(block, page) || self.bytes.is_empty() || self.bytes.len() >= MOST {
            self.tell()?;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + PAGE, 0);
        from.read_exact(&mut self.bytes[old..])?;
        // QEMU may have been told not to look.
        if is_zero(&self.bytes[old..]) {
            self.bytes.truncate(old);
            return self.zero(block, page);
        }
        self.extend(block, page);
        self.stored += PageCount(1);
        Ok(())
    }

    /// A page of zeros.
    pub(super) fn zero(&mut self, block: BlockId, page: PageIndex) -> Result<(), ReadError> {
        if !self.continues(block, page) || !self.bytes.is_empty() {
            self.tell()?;
        }
        self.extend(block, page);
        Ok(())
    }

    fn continues(&self, block: BlockId, page: PageIndex) -> bool {
        self.run.block == block && self.run.end() == page
    }

    fn extend(&mut self, block: BlockId, page: PageIndex) {
        if self.run.is_empty() {
            self.run = PageRun::new(block, page, PageCount(0));
        }
        self.run.pages += PageCount(1);
    }

    /// Tells the sink what there is.
    pub(super) fn tell(&mut self) -> Result<(), ReadError> {
        let reply = match (self.run.is_empty(), self.bytes.is_empty()) {
            (true, _) => return Ok(()),
            (false, true) => self.sink.zero(self.run),
            (false, false) => self.sink.data(self.run, PageBytes::from_slice(&self.bytes)),
        };
        self.run.pages = PageCount(0);
        self.bytes.clear();
        taken(self.sink, reply)
    }
}

/// Whether the sink goes on.
pub(super) fn taken(sink: &dyn PageSink, reply: Reply) -> Result<(), ReadError> {
    match reply {
        Reply::Taken => Ok(()),
        // Not that ordinary memory could be.
        Reply::Unreadable(run) => {
            let error = SourceError::new(SourceErrorKind::Unreadable, Subject::none().run(run), "it could not be read");
            match sink.failed(run, error) {
                Reply::Stop(error) => Err(ReadError::Sink(error)),
                Reply::Taken | Reply::Unreadable(_) => Ok(()),
            }
        }
        Reply::Stop(error) => Err(ReadError::Sink(error)),
    }
}
