//! A feed that several threads ask.

use std::sync::OnceLock;

use page_units::PageRun;
use parking_lot::RwLock;

use crate::{Answer, Feed, SourceError, Urgency};

/// A [`Feed`] that several threads ask and one of them finishes, while the others may still be asking.
///
/// Dropping it drops the feed, if it was not finished.
#[derive(Debug)]
pub struct SharedFeed {
    /// Held for reading while somebody asks.
    feed: RwLock<Option<Box<dyn Feed>>>,
    finished: OnceLock<Result<(), SourceError>>,
}

impl SharedFeed {
    /// Takes over `feed`.
    #[must_use]
    pub fn new(feed: Box<dyn Feed>) -> SharedFeed {
        SharedFeed { feed: RwLock::new(Some(feed)), finished: OnceLock::new() }
    }

    /// [`Feed::request`]; `None` if it was finished.
    pub fn request(&self, run: PageRun, urgency: Urgency) -> Option<Answer> {
        // Not held up by one who waits to finish: a request may take long, and others must not wait for it.
        self.feed.read_recursive().as_ref().map(|feed| feed.request(run, urgency))
    }

    /// [`Feed::finish`], after the requests that are being made just now. Called again, it says the same again.
    ///
    /// # Errors
    /// As [`Feed::finish`].
    pub fn finish(&self) -> Result<(), SourceError> {
        let mut feed = self.feed.write();
        self.take(&mut feed)
    }

    /// The same, but `None` if somebody is asking just now.
    pub fn try_finish(&self) -> Option<Result<(), SourceError>> {
        let mut feed = self.feed.try_write()?;
        Some(self.take(&mut feed))
    }

    fn take(&self, feed: &mut Option<Box<dyn Feed>>) -> Result<(), SourceError> {
        let finish = || feed.take().map_or(Ok(()), Feed::finish);
        self.finished.get_or_init(finish).clone()
    }
}
