//! A feed that several threads ask.

use page_units::PageRun;
use parking_lot::{Mutex, RwLock};

use crate::{Answer, Feed, SourceError, Urgency};

/// A [`Feed`] that several threads ask and one of them finishes, while the others may still be asking.
///
/// Dropping it drops the feed, if it was not finished.
#[derive(Debug)]
pub struct SharedFeed {
    /// Held for reading while somebody asks.
    feed: RwLock<Option<Box<dyn Feed>>>,
    finished: Mutex<Option<Result<(), SourceError>>>,
}

impl SharedFeed {
    /// Takes over `feed`.
    #[must_use]
    pub fn new(feed: Box<dyn Feed>) -> SharedFeed {
        SharedFeed { feed: RwLock::new(Some(feed)), finished: Mutex::default() }
    }

    /// [`Feed::request`]; `None` if it was finished.
    pub fn request(&self, run: PageRun, urgency: Urgency) -> Option<Answer> {
        // Recursive, so that nobody is held up by one who waits to finish until a slow request has returned.
        self.feed.read_recursive().as_ref().map(|feed| feed.request(run, urgency))
    }

    /// [`Feed::finish`], after the requests that are being made just now. Called again, it says the same again.
    ///
    /// # Errors
    /// As [`Feed::finish`].
    pub fn finish(&self) -> Result<(), SourceError> {
        let mut finished = self.finished.lock();
        if finished.is_none() {
            // In two steps: who asks meanwhile is told, and does not wait.
            let feed = self.feed.write().take();
            *finished = Some(feed.map_or(Ok(()), Feed::finish));
        }
        finished.clone().unwrap_or(Ok(()))
    }

    /// The same, but `None` if somebody is asking just now, or finishing it.
    pub fn try_finish(&self) -> Option<Result<(), SourceError>> {
        let mut finished = self.finished.try_lock()?;
        if finished.is_none() {
            let feed = self.feed.try_write()?.take();
            *finished = Some(feed.map_or(Ok(()), Feed::finish));
        }
        finished.clone()
    }
}
