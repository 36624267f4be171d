//! The thread that reads.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use page_units::PageRun;

use super::error::ReadError;
use page_source::{End, Feed, PageSink, SourceError, Urgency};

/// Owns the thread. Dropping it hangs up and joins.
#[derive(Debug)]
pub(super) struct StreamFeed {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl StreamFeed {
    /// Starts the thread: it does `read`, hangs up, and tells the sink how it ended.
    pub(super) fn start(
        socket: UnixStream,
        peer: String,
        sink: Arc<dyn PageSink>,
        read: impl FnOnce(&dyn PageSink) -> Result<(), ReadError> + Send + 'static,
    ) -> io::Result<StreamFeed> {
        let own = socket.try_clone()?;
        let thread = thread::Builder::new().name("page-source-stream".to_owned()).spawn(move || {
            let hang_up = HangUp(own);
            let end = match read(&*sink) {
                Ok(()) => End::Complete,
                Err(ReadError::Sink(error)) => End::Broken(SourceError::Stopped { reason: error.to_string() }),
                Err(error) => End::Broken(SourceError::Peer { peer, reason: error.to_string() }),
            };
            // First, so that the peer does not wait for us while the sink looks at the end.
            drop(hang_up);
            sink.end(end);
        })?;
        Ok(StreamFeed { socket, thread: Some(thread) })
    }
}

impl Feed for StreamFeed {
    /// Each page that has not come yet comes in its turn: nothing hurries it.
    fn request(&self, _: PageRun, _: Urgency) {}

    fn alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for StreamFeed {
    fn drop(&mut self) {
        // Fails only if the peer has hung up already.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // If it panicked, nobody was told: `alive` said so.
            drop(thread.join());
        }
    }
}

/// Hangs up when it is dropped, however the thread ends.
struct HangUp(UnixStream);

impl Drop for HangUp {
    fn drop(&mut self) {
        // Fails only if the peer has hung up already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
