//! How the writing of a file ended.

use parking_lot::Mutex;

use page_source::{End, SinkError, SourceError};

/// What a file writer remembers: the first thing that went wrong, and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    wrong: Option<SinkError>,
    ended: bool,
    published: bool,
}

impl Outcome {
    /// Something went wrong: the file will not be published.
    pub(crate) fn fail(&self, error: SinkError) -> SinkError {
        self.state.lock().wrong.get_or_insert(error).clone()
    }

    /// Pages can't be had: the file will not be published.
    pub(crate) fn lacks(&self, error: SourceError) -> SinkError {
        self.fail(SinkError::Source { error })
    }

    /// The flow has ended. Calls `publish` if the file is complete and this is its first end.
    pub(crate) fn end(&self, end: End, publish: impl FnOnce() -> Result<(), SinkError>) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        match end {
            End::Broken(error) => {
                state.wrong.get_or_insert(SinkError::Source { error });
            }
            End::Complete if state.wrong.is_none() => match publish() {
                Ok(()) => state.published = true,
                Err(error) => state.wrong = Some(error),
            },
            End::Complete => {}
        }
    }

    /// Whether the file is there; if not, why.
    pub(crate) fn get(&self) -> Result<(), SinkError> {
        let state = self.state.lock();
        match &state.wrong {
            _ if state.published => Ok(()),
            Some(error) => Err(error.clone()),
            None => Err(SinkError::Stopped { reason: "the flow has not ended yet".to_owned() }),
        }
    }
}
