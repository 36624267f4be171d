//! Writing behind: what was written starts on its way to the disk while the rest is still being written.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder as Thread, JoinHandle};

use page_units::{ByteLen, FileOffset};
use parking_lot::Mutex;

use crate::sys::start_writing;

/// So much is sent off at a time.
const PIECE: ByteLen = ByteLen(8 << 20);

/// Shorter runs wait for their neighbours: a file that is sent to the disk page by page, in any order, ends up in as many
/// pieces there.
const LONG: ByteLen = ByteLen(64 << 10);

/// A range of the file, from its first byte to the byte after its last.
type Range = (FileOffset, FileOffset);

/// Sends what is written off to the disk. It never waits for the disk, and reports no error: making the file durable at
/// the end does both.
#[derive(Debug, Default)]
pub(crate) struct Behind(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Written, and not sent off.
    pending: Option<(Range, ByteLen)>,
    flusher: Option<Flusher>,
}

/// The thread that waits where the kernel makes who sends off wait.
#[derive(Debug)]
struct Flusher {
    ranges: Option<Sender<Range>>,
    /// What is still to be sent off is of no use to anybody.
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Behind {
    /// So much was written there.
    pub(crate) fn written(&self, file: &File, at: FileOffset, length: ByteLen) {
        let Some(end) = at.checked_add(length).filter(|_| length >= LONG) else { return };
        let mut state = self.0.lock();
        let ((first, last), bytes) = state.pending.take().unwrap_or(((at, end), ByteLen(0)));
        let (range, bytes) = ((first.min(at), last.max(end)), ByteLen(bytes.0 + length.0));
        if bytes < PIECE {
            state.pending = Some((range, bytes));
            return;
        }
        if state.flusher.is_none() {
            state.flusher = Flusher::start(file);
        }
        if let Some(Flusher { ranges: Some(ranges), .. }) = &state.flusher {
            // It ends only with this.
            let _ = ranges.send(range);
        }
    }
}

impl Flusher {
    /// `None` if there is no thread to be had: then all of the file goes to the disk at the end.
    fn start(file: &File) -> Option<Flusher> {
        let file = file.try_clone().ok()?;
        let (ranges, arriving) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = Thread::new().name("write-behind".into()).spawn(move || run(&file, &arriving, &stop)).ok()?;
        Some(Flusher { ranges: Some(ranges), over, thread: Some(thread) })
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        drop(self.ranges.take());
        // Nothing in it panics, and the file would be as it should be all the same.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn run(file: &File, ranges: &Receiver<Range>, over: &AtomicBool) {
    while let Ok((first, end)) = ranges.recv() {
        if !over.load(Ordering::Relaxed) {
            start_writing(file, first, end);
        }
    }
}
