//! What the source gives: taken apart into messages, each page once, and held up if the destination is slower.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::thread;

use page_source::{End, PageBytes, PageSink, Reply, SinkError, SourceError, SourceErrorKind, Subject};
use page_units::{BlockId, ByteLen, PageCount, PageIndex, PageRun};

use super::outlet::Outlet;
use super::pages::BlockPages;

type Flow = ControlFlow<Reply>;

/// The most pages in one message: what a request may have to wait for.
const PIECE: PageCount = PageCount(64);

impl Outlet {
    /// Takes a part of a run that lies in one block; `content` is as long as the run.
    fn take(&self, run: PageRun, content: Option<PageBytes<'_>>) -> Flow {
        let Some(block) = self.pages.block(run.block) else { return self.outside(run) };
        if run.end().0 > block.granules * block.per_granule {
            return self.outside(run);
        }
        let unreadable = |run| ControlFlow::Break(Reply::Unreadable(run));
        let mut from = ByteLen(0);
        if block.per_granule == 1 {
            for piece in run.pieces(PIECE) {
                let bytes = content.map(|content| content.slice(from, piece.len()));
                if self.post_small(block, piece, bytes).is_err() {
                    return unreadable(piece);
                }
                from += piece.len();
            }
            return ControlFlow::Continue(());
        }
        let mut rest = run;
        while !rest.is_empty() {
            let granule = rest.first.0 / block.per_granule;
            let left = (granule + 1) * block.per_granule - rest.first.0;
            let (piece, after) = rest.split_at(PageCount(left));
            rest = after;
            let within = usize::try_from(piece.first.0 % block.per_granule).unwrap_or(0);
            let size = usize::try_from(block.per_granule).unwrap_or(0);
            let part = (within, usize::try_from(piece.pages.0).unwrap_or(0));
            let bytes = content.map(|content| content.slice(from, piece.len()));
            from += piece.len();
            if block.sent.get(granule) {
                continue;
            }
            match self.assemblies.add(run.block, granule, size, part, bytes) {
                Err(_) => return unreadable(piece),
                Ok(None) => {}
                Ok(Some(whole)) => {
                    if self.post_huge(block, granule, &whole).is_err() {
                        return unreadable(piece);
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    fn outside(&self, run: PageRun) -> Flow {
        let what = format!("the source sent {run}, which does not exist");
        self.source_fails(SourceError::new(SourceErrorKind::Protocol, Subject::none().run(run), what));
        self.go_on()
    }

    fn go_on(&self) -> Flow {
        if self.is_over() {
            return ControlFlow::Break(SinkError::stopped("the destination takes no more pages").into());
        }
        ControlFlow::Continue(())
    }

    /// Holds up a thread of the source that is faster than the destination, unless somebody waits for these pages.
    fn slow_down(&self, run: PageRun) {
        let me = thread::current().id();
        if self.own_threads.iter().any(|own| own.get() == Some(&me)) {
            return;
        }
        let wanted = |block: &BlockPages| run.iter().any(|page| block.wanted.get(page.0 / block.per_granule));
        if self.pages.block(run.block).is_some_and(wanted) {
            return;
        }
        while !self.window.has_room(&self.main, PageCount(0), PageCount(0))
            && self.main.error().is_none()
            && !self.is_over()
        {
            self.window.wait(&self.main);
        }
    }
}

impl PageSink for Outlet {
    fn data(&self, run: PageRun, bytes: PageBytes<'_>) -> Reply {
        let take = || {
            self.go_on()?;
            if bytes.len() != run.len() {
                return self.outside(run);
            }
            self.slow_down(run);
            self.take(run, Some(bytes))?;
            self.go_on()
        };
        take().into()
    }

    fn zero(&self, run: PageRun) -> Reply {
        let take = || {
            self.go_on()?;
            self.take(run, None)?;
            self.go_on()
        };
        take().into()
    }

    fn absent(&self, run: PageRun) -> Reply {
        let error = SinkError::Absent(run);
        let what = format!("{error}");
        self.source_fails(SourceError::new(SourceErrorKind::Corrupt, Subject::none().run(run), what));
        error.into()
    }

    fn failed(&self, run: PageRun, error: SourceError) -> Reply {
        let needed = |block: &BlockPages| run.iter().any(|page| !block.sent.get(page.0 / block.per_granule));
        if self.pages.block(run.block).is_none_or(needed) {
            self.source_fails(error);
        }
        self.go_on().into()
    }

    fn end(&self, end: End) {
        match end {
            End::Complete => {
                self.source_complete.store(true, Ordering::SeqCst);
                for (id, block) in (0..).map(BlockId).zip(&self.pages.blocks) {
                    let waiting = (0..block.granules).filter(|at| block.wanted.get(*at) && !block.sent.get(*at));
                    for granule in waiting {
                        let first = PageIndex(granule * block.per_granule);
                        // Stops only if all is over.
                        let _ = self.take(PageRun::new(id, first, PageCount(block.per_granule)), None);
                    }
                }
                self.shared.pusher.ring();
            }
            // Of no importance once everything has come, or nothing is wanted any more.
            _ if self.has_ended() || self.is_over() || self.source_finishes.load(Ordering::SeqCst) => {}
            End::Broken(error) => self.source_fails(error),
            End::Stopped => {
                let what = "it ended before everything had come";
                let subject = Subject::peer("the source of the pages");
                self.source_fails(SourceError::new(SourceErrorKind::PeerGone, subject, what));
            }
        }
    }
}
