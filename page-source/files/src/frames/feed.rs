//! Answering requests from frames, on the thread that asks.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use frame_file::Frame;
use page_source::{
    Answer, EndGuard, Feed, PageBytes, PageSink, Reply, SourceError, SourceErrorKind, Subject, Urgency, deliver,
};
use page_units::{ByteLen, FileOffset, PAGE_SHIFT, PAGE_SIZE, PageCount, PageRun};

use super::Frames;
use crate::mapped_ram::from_page_error;

/// The feed of a compressed snapshot. It owns no thread: it is done when [`Feed::request`] returns.
///
/// A demand request is answered first; what else its frame holds follows, since it costs no decoding any more.
#[derive(Debug)]
pub(crate) struct FrameFeed {
    frames: Arc<Frames>,
    end: EndGuard,
    stopped: AtomicBool,
}

impl FrameFeed {
    pub(crate) fn start(frames: Arc<Frames>, sink: Arc<dyn PageSink>) -> Box<dyn Feed> {
        Box::new(FrameFeed { frames, end: EndGuard::new(sink), stopped: AtomicBool::new(false) })
    }

    fn sink(&self) -> &dyn PageSink {
        self.end.sink()
    }

    /// Delivers all of `run`. Returns the last frame that was decoded for it.
    fn deliver(&self, run: PageRun) -> ControlFlow<Reply, Option<Frame>> {
        let mut rest = run;
        let mut last = None;
        while !rest.is_empty() {
            let snapshot = &self.frames.snapshot;
            let found = match snapshot.load_run(rest.block, rest.first, rest.pages) {
                Ok(found) => found,
                Err(error) => {
                    self.sink().failed(rest, from_page_error(snapshot, rest, error)).branch()?;
                    return ControlFlow::Continue(last);
                }
            };
            let (same, later) = rest.split_at(found.pages());
            if found.is_stored() {
                last = self.stored(same)?.or(last);
            } else {
                self.sink().zero(same).branch()?;
            }
            rest = later;
        }
        ControlFlow::Continue(last)
    }

    /// Delivers pages that are all stored.
    fn stored(&self, run: PageRun) -> ControlFlow<Reply, Option<Frame>> {
        let mut rest = run;
        let mut last = None;
        while !rest.is_empty() {
            let offset = self.offset(rest);
            let frame = match self.frames.frame_at(rest, offset) {
                Ok(frame) => frame,
                Err(error) => {
                    self.sink().failed(rest, error).branch()?;
                    break;
                }
            };
            let inside = PageCount((frame.decoded().end - offset).0 / PAGE_SIZE);
            let (now, later) = rest.split_at(inside.max(PageCount(1)));
            if inside == PageCount(0) {
                self.across_frames(now)?;
            } else if frame.is_zero() {
                self.sink().zero(now).branch()?;
            } else {
                self.in_frame(now, &frame)?;
                last = Some(frame);
            }
            rest = later;
        }
        ControlFlow::Continue(last)
    }

    /// Pages of one frame: if it is corrupt, they fail, and no others.
    fn in_frame(&self, run: PageRun, frame: &Frame) -> ControlFlow<Reply> {
        match self.frames.content(run, frame) {
            Ok(content) => {
                let bytes = PageBytes::from_slice(&content);
                let from = self.offset(run) - frame.decoded().start;
                deliver(self.sink(), run, bytes.slice(from, run.len()), |gone| self.unreadable(gone))
            }
            Err(error) => self.sink().failed(run, error).branch(),
        }
    }

    /// A page that begins in one frame and ends in another: of a file that was cut by somebody else.
    fn across_frames(&self, page: PageRun) -> ControlFlow<Reply> {
        let mut bytes = [0; 1 << PAGE_SHIFT];
        match self.frames.read(page, &mut bytes, self.offset(page)) {
            Ok(()) => deliver(self.sink(), page, PageBytes::from_slice(&bytes), |gone| self.unreadable(gone)),
            Err(error) => self.sink().failed(page, error).branch(),
        }
    }

    /// Delivers what else `frame` holds of the block, before and behind `run`.
    fn rest_of(&self, frame: &Frame, run: PageRun) -> ControlFlow<Reply> {
        let Some(block) = self.frames.snapshot.block(run.block) else { return ControlFlow::Continue(()) };
        let pages = self.frames.snapshot.layout().get(run.block).map_or(PageCount(0), |ram| ram.pages());
        let page_at = |offset: FileOffset| ByteLen(offset.0.saturating_sub(block.pages_offset.0)).to_pages();
        // Whole pages that lie in the frame.
        let first = page_at(frame.decoded().start);
        let end = ByteLen(frame.decoded().end.0.saturating_sub(block.pages_offset.0)).0 / PAGE_SIZE;
        let whole = PageRun::new(
            run.block,
            page_units::PageIndex(first.0),
            PageCount(end.min(pages.0).saturating_sub(first.0)),
        );
        let before = PageCount(run.first.0.saturating_sub(whole.first.0)).min(whole.pages);
        let (before, others) = whole.split_at(before);
        let (_, behind) = others.split_at(PageCount(run.end().0.saturating_sub(others.first.0)).min(others.pages));
        for part in [behind, before] {
            self.stored_only(part, frame)?;
        }
        ControlFlow::Continue(())
    }

    /// Delivers the stored pages of `run`, which lies in `frame`, and says nothing of the others.
    fn stored_only(&self, run: PageRun, frame: &Frame) -> ControlFlow<Reply> {
        let mut rest = run;
        while !rest.is_empty() {
            let Ok(found) = self.frames.snapshot.load_run(rest.block, rest.first, rest.pages) else { break };
            let (same, later) = rest.split_at(found.pages());
            if found.is_stored() {
                self.in_frame(same, frame)?;
            }
            rest = later;
        }
        ControlFlow::Continue(())
    }

    /// Where the first page of `run` is in the content.
    fn offset(&self, run: PageRun) -> FileOffset {
        let base = self.frames.snapshot.block(run.block).map_or(u64::MAX, |block| block.pages_offset.0);
        FileOffset(base.saturating_add(run.first.byte_offset().0))
    }

    /// That the sink could not read what it was lent.
    fn unreadable(&self, run: PageRun) -> SourceError {
        let subject = Subject::file(self.frames.snapshot.path()).run(run);
        SourceError::new(SourceErrorKind::Unreadable, subject, format!("the sink could not read {run}"))
    }

    fn outside(&self, run: PageRun) -> SourceError {
        let subject = Subject::file(self.frames.snapshot.path()).run(run);
        SourceError::new(
            SourceErrorKind::Protocol,
            subject,
            format!("{run} was asked for, which the source does not have"),
        )
    }
}

impl Feed for FrameFeed {
    fn request(&self, run: PageRun, urgency: Urgency) -> Answer {
        if run.is_empty() || self.stopped.load(Ordering::Relaxed) {
            return Answer::Here;
        }
        let flow = if self.frames.snapshot.layout().contains(run) {
            match self.deliver(run) {
                ControlFlow::Continue(Some(frame)) if urgency == Urgency::Demand => self.rest_of(&frame, run),
                ControlFlow::Continue(_) => ControlFlow::Continue(()),
                ControlFlow::Break(reply) => ControlFlow::Break(reply),
            }
        } else {
            self.sink().failed(run, self.outside(run)).branch()
        };
        if let ControlFlow::Break(Reply::Stop(error)) = flow {
            log::debug!("the sink takes no more pages: {error}");
            self.stopped.store(true, Ordering::Relaxed);
        }
        Answer::Here
    }

    /// Nothing can have changed unnoticed: each frame was checked against a digest that was read when the file was opened.
    fn finish(self: Box<Self>) -> Result<(), SourceError> {
        Ok(())
    }
}
