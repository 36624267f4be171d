//! The stream as a source.

use std::fmt::Display;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use page_units::{BlockId, ByteLen, FileOffset, Layout, PageCount, PageIndex};
use parking_lot::Mutex;
use vmstate::ram::RecordReader;
use vmstate::{Configuration, StreamReader};

use super::blocks;
use super::error::ReadError;
use super::feed::StreamFeed;
use super::records::Records;
use page_source::{Content, Feed, PageSink, PageSource, SourceError, Span};

/// How much is taken from the socket at once.
const BUFFER: usize = 256 << 10;

/// A plain migration stream that arrives at a socket.
///
/// Its layout is known once the list of RAM blocks has come; pages are pushed from [`start`](PageSource::start) on,
/// which can be called once. Requests are neither needed nor of any effect: each page that has not come yet comes in
/// its turn, and those that the stream leaves out are told as zero at its end.
#[derive(Debug)]
pub struct QemuStream {
    peer: String,
    socket: UnixStream,
    configuration: Configuration,
    layout: Layout,
    rest: Mutex<Option<Records<BufReader<UnixStream>>>>,
    device_state: Arc<OnceLock<Vec<u8>>>,
}

impl QemuStream {
    /// Reads the beginning of the stream, which waits for the peer. To give up meanwhile, shut the socket down from
    /// another thread. `peer` is what errors call the other side, `most_ram` the most RAM that is believed.
    ///
    /// # Errors
    /// If it is no plain stream, or does not come.
    pub fn open(socket: UnixStream, peer: impl Display, most_ram: ByteLen) -> Result<QemuStream, ReadError> {
        let io = |error| vmstate::StreamError::Io { at: FileOffset(0), error };
        let own = socket.try_clone().map_err(io)?;
        let mut from = StreamReader::new(BufReader::with_capacity(BUFFER, own), FileOffset(0));
        let mut records = RecordReader::new();
        let (configuration, layout) = blocks::read(&mut from, &mut records, most_ram)?;
        let rest = Mutex::new(Some(Records { from, records }));
        let device_state = Arc::new(OnceLock::new());
        Ok(QemuStream { peer: peer.to_string(), socket, configuration, layout, rest, device_state })
    }

    /// What machine was saved.
    #[must_use]
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// What follows RAM: the sections of all devices with their footers, the end mark and the description. There as
    /// soon as the flow has ended with [`End::Complete`](page_source::End::Complete).
    #[must_use]
    pub fn device_state(&self) -> Option<&[u8]> {
        self.device_state.get().map(Vec::as_slice)
    }
}

impl PageSource for QemuStream {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn run_at(&self, block: BlockId, first: PageIndex) -> Span {
        let all = self.layout.get(block).map_or(0, |ram| ram.pages().0);
        Span { content: Content::Unknown, pages: PageCount(all.saturating_sub(first.0)) }
    }

    fn repeatable(&self) -> bool {
        false
    }

    fn start(&self, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let stopped = |reason: String| SourceError::Stopped { reason };
        let Some(rest) = self.rest.lock().take() else {
            return Err(stopped(format!("{}: it was read before, and comes only once", self.peer)));
        };
        let socket = self.socket.try_clone().map_err(|error| stopped(format!("{}: {error}", self.peer)))?;
        let (peer, layout) = (self.peer.clone(), self.layout.clone());
        let device_state = Arc::clone(&self.device_state);
        let feed = StreamFeed::start(socket, peer, sink, move |sink| {
            let state = rest.run(&layout, sink)?;
            // Nobody else sets it.
            let _ = device_state.set(state);
            Ok(())
        });
        Ok(Box::new(feed.map_err(|error| stopped(format!("no thread can be started: {error}")))?))
    }
}
