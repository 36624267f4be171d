//! Driving a source into a sink, when nobody asks for single pages: converting, compressing, sending.

mod counting;
mod relay;

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use page_units::PageCount;

use self::relay::{Relay, Stop};
use crate::{End, PageSink, SinkError, Source, SourceError, Urgency};

/// How often the progress is told.
const TICK: Duration = Duration::from_millis(50);

/// How to [`pump`].
#[derive(Clone, Copy)]
pub struct PumpOptions<'a> {
    /// How many threads ask; with a local file, they also do the work. At least one is used.
    pub threads: usize,
    /// How much is asked for at a time.
    pub piece: PageCount,
    /// How much may be asked for and not be there yet. A piece is always.
    pub window: PageCount,
    /// Whether stored pages are looked through for zero pages, so that the sink gets those as zero.
    pub find_zeros: bool,
    /// Told now and then, on the calling thread.
    pub progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

impl Default for PumpOptions<'_> {
    /// One thread, pieces of 1 MiB, a window of 16 MiB.
    fn default() -> Self {
        let (piece, window) = (PageCount(256), PageCount(4096));
        PumpOptions { threads: 1, piece, window, find_zeros: false, progress: None }
    }
}

impl fmt::Debug for PumpOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PumpOptions")
            .field("threads", &self.threads)
            .field("piece", &self.piece)
            .field("window", &self.window)
            .field("find_zeros", &self.find_zeros)
            .finish_non_exhaustive()
    }
}

/// How far a [`pump`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages that have arrived, or are known to be zero.
    pub done: PageCount,
    /// All of them.
    pub total: PageCount,
}

/// What a [`pump`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pumped {
    /// Pages that arrived with content.
    pub stored: PageCount,
    /// Pages that are zero.
    pub zero: PageCount,
    /// Pages about which the source has nothing to say.
    pub absent: PageCount,
    /// Pages that arrived more often than once.
    pub again: PageCount,
}

/// Why a [`pump`] did not get to the end. The sink was told that it is broken.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PumpError {
    /// Pages are unavailable.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Pages could not be taken.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// Asks `source` for every page, gives them to `sink`, and ends it: [`End::Complete`] exactly if every page has
/// arrived and the source [finished](crate::Feed::finish) well, otherwise [`End::Broken`]. Whether the sink makes
/// something of it that others see (a file with a name) is another question, to be asked of the sink.
///
/// Memory stays bounded, however late the source answers: at most [`PumpOptions::window`] pages are asked for at a
/// time.
///
/// # Errors
/// The first failure of the source or the sink.
///
/// # Panics
/// If the sink or a progress callback panics.
pub fn pump(
    source: impl Into<Source>,
    sink: Arc<dyn PageSink>,
    options: &PumpOptions<'_>,
) -> Result<Pumped, PumpError> {
    let source = source.into();
    let pages = source.pages();
    let relay = Arc::new(Relay::new(pages.layout().clone(), Arc::clone(&sink), options));
    let feed = match source.start(Arc::clone(&relay) as Arc<dyn PageSink>) {
        Ok(feed) => feed,
        Err(error) => {
            sink.end(End::Broken(error.clone()));
            return Err(error.into());
        }
    };
    thread::scope(|scope| {
        for _ in 0..options.threads.max(1) {
            scope.spawn(|| {
                let _working = relay.working();
                while let Some(run) = relay.next(&*pages) {
                    feed.request(run, Urgency::Background);
                }
            });
        }
        match options.progress {
            None => relay.wait(),
            Some(progress) => {
                while !relay.wait_for(TICK) {
                    progress(relay.progress());
                }
            }
        }
    });
    let finished = feed.finish();
    let ended = relay.finish().and_then(|pumped| match finished {
        Ok(()) => Ok(pumped),
        Err(error) => Err(Stop::Source(error)),
    });
    match ended {
        Ok(pumped) => {
            if let Some(progress) = options.progress {
                progress(relay.progress());
            }
            sink.end(End::Complete);
            Ok(pumped)
        }
        Err(Stop::Source(error)) => {
            sink.end(End::Broken(error.clone()));
            Err(error.into())
        }
        Err(Stop::Sink(error)) => {
            sink.end(End::Broken(SourceError::stopped(&error)));
            Err(error.into())
        }
    }
}
