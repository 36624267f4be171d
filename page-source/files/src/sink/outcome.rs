//! How the writing of a file goes, up to its end.

use page_source::{End, SinkError, SourceError};
use page_units::PageRun;
use parking_lot::Mutex;

/// What a file writer remembers: the first thing that went wrong, and how the flow ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    wrong: Option<SinkError>,
    end: Option<End>,
    published: bool,
}

impl Outcome {
    /// Something went wrong: the file will not be published.
    pub(crate) fn fail(&self, error: SinkError) -> SinkError {
        self.state.lock().wrong.get_or_insert(error).clone()
    }

    /// Pages can't be delivered: the file will not be published.
    pub(crate) fn lacks(&self, error: SourceError) -> SinkError {
        self.fail(SinkError::Source { error })
    }

    /// Pages are to be looked for in a layer below, which a file like this does not have.
    pub(crate) fn absent(&self, run: PageRun) -> SinkError {
        self.fail(SinkError::Absent(run))
    }

    /// The flow has ended.
    pub(crate) fn end(&self, end: End) {
        let mut state = self.state.lock();
        if let End::Broken(error) = &end {
            state.wrong.get_or_insert(SinkError::Source { error: error.clone() });
        }
        state.end.get_or_insert(end);
    }

    /// How the flow ended, if it has.
    pub(crate) fn ended(&self) -> Option<End> {
        self.state.lock().end.clone()
    }

    /// Why the file could not be written, if so, whatever the source did.
    pub(crate) fn refused(&self) -> Option<SinkError> {
        self.state.lock().wrong.clone().filter(|error| !matches!(error, SinkError::Source { .. }))
    }

    /// Calls `publish` if the flow has ended well, the first time.
    pub(crate) fn publish(&self, publish: impl FnOnce() -> Result<(), SinkError>) -> Result<(), SinkError> {
        let mut state = self.state.lock();
        if let Some(error) = &state.wrong {
            return Err(error.clone());
        }
        match state.end {
            Some(End::Complete) if !state.published => {}
            Some(End::Complete) => return Err(SinkError::stopped("it was published before")),
            Some(_) => return Err(SinkError::stopped("not all pages were delivered")),
            None => return Err(SinkError::stopped("the flow has not ended yet")),
        }
        match publish() {
            Ok(()) => {
                state.published = true;
                Ok(())
            }
            Err(error) => {
                state.wrong = Some(error.clone());
                Err(error)
            }
        }
    }
}
