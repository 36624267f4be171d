//! Writeback: what was written starts on its way to the disk while the rest is still being written.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder as Thread, JoinHandle};

use page_units::{ByteLen, FileOffset};
use parking_lot::Mutex;

use crate::sys::start_writing;

/// How many written bytes are collected before they are sent to the disk.
const PIECE: ByteLen = ByteLen(8 << 20);

/// The shortest run that is sent early. Shorter ones are left to the end: a file that reaches the disk page by page, in
/// any order, lies there in as many pieces.
const SHORTEST: ByteLen = ByteLen(64 << 10);

/// A range of the file, from its first byte to the byte after its last.
type Range = (FileOffset, FileOffset);

/// Sends written ranges to the disk. It never waits for the disk, and reports no error: making the file durable at the
/// end does both.
#[derive(Debug, Default)]
pub(crate) struct Writeback(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// What was written since the last piece: the range around it, and its bytes.
    pending: Option<(Range, ByteLen)>,
    flusher: Option<Flusher>,
}

/// A thread of its own, since starting a write may have to wait for space in the disk's queue.
#[derive(Debug)]
struct Flusher {
    ranges: Option<Sender<Range>>,
    /// Set when the file is finished or given up: ranges still in the queue are skipped.
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writeback {
    /// Records that `length` bytes were written at `at`.
    pub(crate) fn written(&self, file: &File, at: FileOffset, length: ByteLen) {
        let Some(end) = at.checked_add(length).filter(|_| length >= SHORTEST) else { return };
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
            // The receiver lives until `ranges` is dropped.
            let _ = ranges.send(range);
        }
    }
}

impl Flusher {
    /// Starts the thread; `None` if there can't be one more: then all of the file goes to the disk at the end.
    fn start(file: &File) -> Option<Flusher> {
        let file = file.try_clone().ok()?;
        let (ranges, arriving) = channel();
        let over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&over);
        let thread = Thread::new().name("writeback".into()).spawn(move || run(&file, &arriving, &stop)).ok()?;
        Some(Flusher { ranges: Some(ranges), over, thread: Some(thread) })
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        drop(self.ranges.take());
        // The thread does not panic, and even then the file would be as it should be.
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
