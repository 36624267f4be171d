//! The stream as a source.

use std::fmt::Display;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use page_source::{Content, Feed, OneShot, PageSink, Pages, SourceError, Span};
use page_units::{ByteLen, FileOffset, Layout, PageRun};
use vmstate::ram::RecordReader;
use vmstate::{Configuration, StreamReader};

use super::blocks;
use super::error::ReadError;
use super::feed::StreamFeed;
use super::records::Records;

/// How much is taken from the socket at once.
const BUFFER: usize = 256 << 10;

/// A plain migration stream that arrives at a socket.
///
/// Its layout is known once the list of RAM blocks has come; pages are pushed once it is started. Requests are neither
/// needed nor of any effect: each page that has not come yet comes in its turn, and those that the stream leaves out are
/// told as zero at its end.
#[derive(Debug)]
pub struct QemuStream {
    peer: String,
    socket: UnixStream,
    configuration: Configuration,
    pages: Arc<StreamPages>,
    rest: Records<BufReader<UnixStream>>,
    device_state: DeviceState,
}

/// What follows the pages of a [`QemuStream`]: kept from before it is started until after it has ended.
#[derive(Clone, Debug, Default)]
pub struct DeviceState(Arc<OnceLock<Vec<u8>>>);

impl DeviceState {
    /// The sections of all devices with their footers, the end mark and the description. There as soon as the flow has
    /// ended with [`End::Complete`](page_source::End::Complete).
    #[must_use]
    pub fn get(&self) -> Option<&[u8]> {
        self.0.get().map(Vec::as_slice)
    }
}

/// The blocks of a stream, of whose pages nothing is known before they come.
#[derive(Debug)]
struct StreamPages(Layout);

impl Pages for StreamPages {
    fn layout(&self) -> &Layout {
        &self.0
    }

    fn content(&self, run: PageRun) -> Span {
        Span::new(Content::Unknown, self.0.clip(run).pages)
    }
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
        let (rest, pages) = (Records { from, records }, Arc::new(StreamPages(layout)));
        Ok(QemuStream {
            peer: peer.to_string(),
            socket,
            configuration,
            pages,
            rest,
            device_state: DeviceState::default(),
        })
    }

    /// What machine was saved.
    #[must_use]
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Its RAM blocks.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.pages.0
    }

    /// Where the device state will be, once it has come.
    #[must_use]
    pub fn device_state(&self) -> DeviceState {
        self.device_state.clone()
    }
}

impl OneShot for QemuStream {
    fn pages(&self) -> Arc<dyn Pages> {
        Arc::<StreamPages>::clone(&self.pages)
    }

    fn start(self: Box<Self>, sink: Arc<dyn PageSink>) -> Result<Box<dyn Feed>, SourceError> {
        let QemuStream { peer, socket, pages, rest, device_state, .. } = *self;
        let feed = StreamFeed::start(socket, peer, sink, move |sink| {
            let state = rest.run(&pages.0, sink)?;
            // Nobody else sets it.
            let _ = device_state.0.set(state);
            Ok(())
        });
        match feed {
            Ok(feed) => Ok(Box::new(feed)),
            Err(error) => Err(SourceError::stopped("no thread can be started").with_cause(error)),
        }
    }
}
