//! The thread that reads.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use page_source::{Answer, End, EndGuard, Feed, PageSink, SourceError, Subject, Urgency};
use page_units::PageRun;

use super::error::ReadError;

/// Owns the thread. Dropping or finishing it hangs up and joins.
#[derive(Debug)]
pub(super) struct StreamFeed {
    socket: UnixStream,
    /// It is we who hang up.
    stopped: Arc<AtomicBool>,
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
        let stopped = Arc::new(AtomicBool::new(false));
        let by_us = Arc::clone(&stopped);
        let thread = thread::Builder::new().name("page-source-stream".to_owned()).spawn(move || {
            // In this order: the peer must not wait for us while the sink looks at the end.
            let guard = EndGuard::new(sink);
            let hang_up = HangUp(own);
            let read = read(guard.sink());
            drop(hang_up);
            guard.end(match read {
                Ok(()) => End::Complete,
                Err(_) if by_us.load(Ordering::Acquire) => End::Stopped,
                Err(ReadError::Sink(error)) => End::Broken(SourceError::stopped(error)),
                Err(error) => End::Broken(SourceError::new(error.kind(), Subject::peer(peer), "").with_cause(error)),
            });
        })?;
        Ok(StreamFeed { socket, stopped, thread: Some(thread) })
    }

    fn stop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        // Fails only if the peer has hung up already.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // If it panicked, the sink was told.
            drop(thread.join());
        }
    }
}

impl Feed for StreamFeed {
    /// Each page that has not come yet comes in its turn: nothing hurries it.
    fn request(&self, _: PageRun, _: Urgency) -> Answer {
        Answer::Later
    }

    /// What has come does not change any more.
    fn finish(mut self: Box<Self>) -> Result<(), SourceError> {
        self.stop();
        Ok(())
    }
}

impl Drop for StreamFeed {
    fn drop(&mut self) {
        self.stop();
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
