//! Snapshot files that are compressed frame by frame: a request decodes the frames that it needs, and each frame is
//! checked against its digest before.

mod cache;
mod feed;

use std::sync::Arc;

use frame_file::{Decoder, Frame, FrameFile, ReadError};
use mapped_ram::Snapshot;
use page_source::{SourceError, SourceErrorKind, Subject};
use page_units::{ByteLen, FileOffset, PageRun};
use parking_lot::Mutex;

use self::cache::FrameCache;
pub(crate) use self::feed::FrameFeed;

/// How many bytes of decoded frames are kept at most, for those that are wanted again at once.
const CACHE: ByteLen = ByteLen(16 << 20);

/// What all flows from one compressed snapshot share.
#[derive(Debug)]
pub(crate) struct Frames {
    pub(crate) snapshot: Arc<Snapshot>,
    cache: FrameCache,
    decoders: Mutex<Vec<Decoder>>,
}

impl Frames {
    /// `None` if the snapshot is a plain file.
    pub(crate) fn new(snapshot: &Arc<Snapshot>) -> Option<Frames> {
        snapshot.frames()?;
        Some(Frames { snapshot: Arc::clone(snapshot), cache: FrameCache::new(CACHE), decoders: Mutex::default() })
    }

    /// The file. (`new` has refused a plain one.)
    fn file(&self) -> Result<&FrameFile, SourceError> {
        let refuse =
            || SourceError::new(SourceErrorKind::Corrupt, Subject::file(self.snapshot.path()), "it has no frames");
        self.snapshot.frames().ok_or_else(refuse)
    }

    /// The frame that holds the first byte of `run`, which is at `offset` of the content.
    fn frame_at(&self, run: PageRun, offset: FileOffset) -> Result<Frame, SourceError> {
        self.file()?.frame_at(offset).map_err(|error| self.failed(run, &error))
    }

    /// The content of a frame, decoded now or a moment ago, by this thread or another.
    fn content(&self, run: PageRun, frame: &Frame) -> Result<Arc<Vec<u8>>, SourceError> {
        let file = self.file()?;
        self.cache.get(frame.number(), |buffer| {
            let mut decoder = self.decoders.lock().pop().unwrap_or_else(|| file.decoder());
            let decoded = file.decode(frame, &mut decoder, buffer);
            self.decoders.lock().push(decoder);
            decoded.map_err(|error| self.failed(run, &error))
        })
    }

    /// A part of the content that need not lie in one frame.
    fn read(&self, run: PageRun, to: &mut [u8], offset: FileOffset) -> Result<(), SourceError> {
        self.file()?.read_exact_at(to, offset).map_err(|error| self.failed(run, &error))
    }

    fn failed(&self, run: PageRun, error: &ReadError) -> SourceError {
        let name = self.snapshot.layout().get(run.block).map_or("?", |block| block.name());
        let subject = Subject::file(self.snapshot.path()).block(name).run(run);
        let (kind, at) = match error {
            ReadError::Read { at, .. } => (SourceErrorKind::Unreadable, *at),
            ReadError::Index { at, .. } | ReadError::Frame { at, .. } => (SourceErrorKind::Corrupt, *at),
            _ => (SourceErrorKind::Truncated, FileOffset(0)),
        };
        SourceError::new(kind, subject.at(at), format!("RAM block \"{name}\": {error}"))
    }
}
