//! Checks for sources and sinks of one's own: does it keep to the contract?
//!
//! [`Suite`] asks a source for its pages in many ways and compares what comes with what should; [`sink`] gives a sink what
//! sources may give it, and what they must not. A [`Breach`] names the rule that was broken. Run them in your tests, over
//! a source of a few hundred pages:
//!
//! ```
//! use std::sync::Arc;
//! use page_source::conformance::{Page, Suite};
//! # use page_source::{Collect, PageSource, Pages, Content, EndGuard, Feed, Answer, PageBytes, PageSink, Span, SourceError, Urgency};
//! # use page_units::{ByteLen, Layout, PageRun, PageSize, RamBlock};
//! # #[derive(Debug)] struct Mine(Layout);
//! # impl Pages for Mine {
//! #     fn layout(&self) -> &Layout { &self.0 }
//! #     fn content(&self, run: PageRun) -> Span { Span::new(Content::Stored, self.0.clip(run).pages) }
//! # }
//! # impl PageSource for Mine {
//! #     fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> { Ok(Box::new(MyFeed(EndGuard::new(sink)))) }
//! # }
//! # #[derive(Debug)] struct MyFeed(EndGuard);
//! # impl Feed for MyFeed {
//! #     fn request(&self, run: PageRun, _: Urgency) -> Answer {
//! #         for one in run.pieces(page_units::PageCount(1)) {
//! #             let reply = self.0.sink().data(one, PageBytes::from_slice(&[7; 4096]));
//! #             if let page_source::Reply::Unreadable(gone) = reply { let _ = self.0.sink().failed(gone, SourceError::stopped("gone")); }
//! #             else if !reply.is_taken() { break; }
//! #         }
//! #         Answer::Here
//! #     }
//! #     fn finish(self: Box<Self>) -> Result<(), SourceError> { Ok(()) }
//! # }
//! # let layout = Layout::new(vec![RamBlock::new("ram", ByteLen(64 << 12), PageSize::SMALL)?])?;
//! # let my_source = Mine(layout);
//!
//! // Each page of this source is full of sevens.
//! Suite::new(|_| Page::Content(vec![7; 4096])).source(Arc::new(my_source))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod breach;
mod one_shot;
mod sink;
mod source;
mod witness;

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use page_units::PageRun;

pub use self::breach::{Breach, Rule};
pub use self::sink::{Made, sink};
use crate::{Feed, SourceError};

/// What a page should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// Its bytes, zero or not.
    Content(Vec<u8>),
    /// The source has nothing to say about it.
    Absent,
    /// Its content can't be delivered: it fails.
    Fails,
}

/// What pages should be: asked with runs of one page.
type Truth = Arc<dyn Fn(PageRun) -> Page + Send + Sync>;

/// Checks sources against what their pages should be.
#[derive(Clone)]
pub struct Suite {
    truth: Truth,
    patience: Duration,
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Suite").field("patience", &self.patience).finish_non_exhaustive()
    }
}

impl Suite {
    /// Compares pages with `truth`, which is asked for one page at a time.
    #[must_use]
    pub fn new(truth: impl Fn(PageRun) -> Page + Send + Sync + 'static) -> Suite {
        Suite { truth: Arc::new(truth), patience: Duration::from_secs(20) }
    }

    /// How long an answer or an end may take before it counts as missing. Default: 20 seconds.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Suite {
        self.patience = patience;
        self
    }

    /// Finishes a feed, or drops it, within the limit.
    fn end(&self, feed: Box<dyn Feed>, finish: bool) -> Result<Result<(), SourceError>, Breach> {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let ended = if finish {
                feed.finish()
            } else {
                drop(feed);
                Ok(())
            };
            // Nobody waits any more, perhaps.
            let _ = tell.send(ended);
        });
        match told.recv_timeout(self.patience) {
            Ok(ended) => Ok(ended),
            Err(mpsc::RecvTimeoutError::Timeout) if finish => Err(Rule::FinishHangs.breach("it did not return")),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Rule::DropHangs.breach("it did not return")),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Err(Rule::Panics.breach("it panicked when the flow was ended"))
            }
        }
    }
}
