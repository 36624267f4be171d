//! Answering requests from mapped files, on the thread that asks.

use std::fmt::Debug;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use page_source::{
    Answer, Content, End, EndGuard, Feed, PageBytes, PageSink, Reply, SourceError, SourceErrorKind, Urgency, deliver,
    deliver_without_zeros,
};
use page_units::{ByteLen, FileOffset, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRun};

use crate::mapped_file::MappedFile;
use crate::places::Places;
use crate::readahead::ReadAhead;

/// The most that is delivered in the background between two checks for changes, in pages: 8 MiB. Pieces end at multiples
/// of it, so that no huge page is cut.
const PIECE: u64 = 2048;

/// The feed of every source that is made of local files. It owns no thread: it is done when [`Feed::request`] returns.
#[derive(Debug)]
pub(crate) struct FileFeed<P: Places> {
    places: Arc<P>,
    end: EndGuard,
    ahead: ReadAhead,
    stopped: AtomicBool,
    scan_for_zeros: bool,
}

impl<P: Places> FileFeed<P> {
    /// A feed into `sink`, which looks for zero pages in what is stored if told to.
    ///
    /// # Errors
    /// If a file has already changed.
    pub(crate) fn start(
        places: Arc<P>,
        sink: Arc<dyn PageSink>,
        scan_for_zeros: bool,
    ) -> Result<Box<dyn Feed>, SourceError> {
        places.files().try_for_each(MappedFile::verify)?;
        let (end, ahead, stopped) = (EndGuard::new(sink), ReadAhead::default(), AtomicBool::new(false));
        Ok(Box::new(FileFeed { places, end, ahead, stopped, scan_for_zeros }))
    }

    fn sink(&self) -> &dyn PageSink {
        self.end.sink()
    }

    fn deliver(&self, run: PageRun, urgency: Urgency) -> ControlFlow<Reply> {
        let mut rest = run;
        while !rest.is_empty() {
            let extent = match self.places.find(rest, urgency) {
                Ok(extent) => extent,
                Err(error) => return self.sink().failed(rest, error).branch(),
            };
            let (all, _) = rest.split_at(extent.pages);
            let now = match (extent.content, extent.at) {
                (Content::Zero, _) => {
                    self.sink().zero(all).branch()?;
                    all
                }
                (Content::Stored | Content::Unknown, Some((file, offset))) => {
                    let (now, _) = all.split_at(PageCount(PIECE - rest.first.0 % PIECE));
                    Stored { feed: self, file, run: now, offset }.deliver(urgency)?;
                    now
                }
                (Content::Absent | Content::Stored | Content::Unknown, _) => {
                    self.sink().absent(all).branch()?;
                    all
                }
            };
            (_, rest) = rest.split_at(now.pages);
            if urgency == Urgency::Background && !rest.is_empty() {
                self.check(rest, urgency)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Fails `run` if a file is known to have changed, and stops there.
    fn check(&self, run: PageRun, urgency: Urgency) -> ControlFlow<Reply> {
        let Some((file, what)) = self.places.files().find_map(|file| Some((file, file.check_for(urgency).err()?)))
        else {
            return ControlFlow::Continue(());
        };
        let at = self.places.find(run, Urgency::Demand).ok().and_then(|extent| Some(extent.at?.1));
        let error = file.change_error(what, self.name(run), run, at.unwrap_or_default());
        self.sink().failed(run, error).branch()?;
        ControlFlow::Break(Reply::Taken)
    }

    fn name(&self, run: PageRun) -> &str {
        self.places.layout().get(run.block).map_or("?", |block| block.name())
    }
}

/// Pages that are in a file, though the last may be there only in part.
struct Stored<'a, P: Places> {
    feed: &'a FileFeed<P>,
    file: &'a MappedFile,
    run: PageRun,
    /// Where the first page is.
    offset: FileOffset,
}

impl<P: Places> Stored<'_, P> {
    fn deliver(&self, urgency: Urgency) -> ControlFlow<Reply> {
        let inside = PageCount(self.file.size().saturating_sub(self.offset.0) / PAGE_SIZE);
        let (whole, rest) = self.run.split_at(inside);
        if !whole.is_empty() {
            if urgency == Urgency::Background {
                self.feed.ahead.announce(self.file, self.offset, whole.len(), self.limit());
            }
            self.whole(whole)?;
        }
        if rest.is_empty() {
            return ControlFlow::Continue(());
        }
        let (last, beyond) = rest.split_at(PageCount(1));
        self.partial(last)?;
        if beyond.is_empty() {
            return ControlFlow::Continue(());
        }
        self.sink().failed(beyond, self.truncated(beyond)).branch()
    }

    fn whole(&self, run: PageRun) -> ControlFlow<Reply> {
        let bytes = self.file.bytes(self.offset, run.len());
        let unreadable = |run: PageRun| self.unreadable(run, run.len(), Errno::EFAULT.into());
        if !self.feed.scan_for_zeros {
            return deliver(self.sink(), run, bytes, unreadable);
        }
        let reply = deliver_without_zeros(self.sink(), run, bytes, |run, error| {
            self.sink().failed(run, self.unreadable(run, run.len(), error))
        });
        match reply {
            Reply::Unreadable(gone) => {
                let (_, rest) = run.split_at(run.intersect(gone).first.max(run.first) - run.first);
                self.sink().failed(rest, unreadable(rest)).branch()
            }
            reply => reply.branch(),
        }
    }

    /// The page in whose middle the file ends: the rest of it is zero.
    fn partial(&self, run: PageRun) -> ControlFlow<Reply> {
        let offset = self.offset_of(run);
        let there = self.file.size().saturating_sub(offset.0).min(PAGE_SIZE);
        if there == 0 {
            return self.sink().failed(run, self.truncated(run)).branch();
        }
        // Read, not mapped: behind the end of the file, a mapping shows what anybody stored there.
        let mut page = [0; 1 << PAGE_SHIFT];
        match self.file.file().read_exact_at(&mut page[..ByteLen(there).get()], offset.0) {
            Ok(()) => self.sink().data(run, PageBytes::from_slice(&page)).branch(),
            Err(error) => self.sink().failed(run, self.unreadable(run, ByteLen(there), error)).branch(),
        }
    }

    fn sink(&self) -> &dyn PageSink {
        self.feed.sink()
    }

    /// Where a part of the run begins; saturates where it can't be, which no file has.
    fn offset_of(&self, part: PageRun) -> FileOffset {
        FileOffset(self.offset.0.saturating_add((part.first - self.run.first).to_bytes().0))
    }

    /// Where the block ends, if it goes on as it does here.
    fn limit(&self) -> FileOffset {
        let pages = self.feed.places.layout().get(self.run.block).map_or(PageCount(0), |block| block.pages());
        FileOffset(self.offset.0.saturating_add(PageCount(pages.0 - self.run.first.0).to_bytes().0))
    }

    /// Reading `length` bytes of the pages failed: maybe because the file is no longer what it was.
    fn unreadable(&self, run: PageRun, length: ByteLen, error: io::Error) -> SourceError {
        let (name, offset) = (self.feed.name(run), self.offset_of(run));
        match self.file.check() {
            Ok(()) => self.file.read_error(name, run, offset, length, error),
            Err(what) => self.file.change_error(what, name, run, offset),
        }
    }

    fn truncated(&self, run: PageRun) -> SourceError {
        let needed = FileOffset(self.offset_of(run).0.saturating_add(run.len().0));
        self.file.truncated(self.feed.name(run), run, needed)
    }
}

impl<P: Places> Feed for FileFeed<P> {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        if run.is_empty() || self.stopped.load(Ordering::Relaxed) {
            return Answer::Here;
        }
        let flow = if self.places.layout().contains(run) {
            match self.check(run, urgency) {
                ControlFlow::Continue(()) => self.deliver(run, urgency),
                failed => failed,
            }
        } else {
            let subject = page_source::Subject::none().run(run);
            let what = format!("{run} was asked for, which the source does not have");
            self.sink().failed(run, SourceError::new(SourceErrorKind::Protocol, subject, what)).branch()
        };
        if let ControlFlow::Break(Reply::Stop(error)) = flow {
            log::debug!("the sink takes no more pages: {error}");
            self.stopped.store(true, Ordering::Relaxed);
        }
        Answer::Here
    }

    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        self.places.files().try_for_each(MappedFile::verify)
    }
}

impl<P: Places> Drop for FileFeed<P> {
    fn drop(&mut self) {
        if let Some(error) = self.places.files().find_map(MappedFile::known_error) {
            self.end.note(End::Broken(error));
        }
    }
}
