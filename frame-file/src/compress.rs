//! Compressing an input on several threads.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::mpsc;
use std::thread;

use page_units::{ByteLen, FileOffset};
use parking_lot::Mutex;

use crate::input::{Cuts, Input};
use crate::{Codec, EncodeError, Encoded, Encoder, FrameWriter};

/// How many frames each thread may have in hand, finished ones that wait for an earlier one included.
const IN_HAND: usize = 8;

/// A part of the input, as a worker has left it.
enum Done {
    Zeros(ByteLen),
    Frame(Encoded),
}

type Numbered = (u64, Result<Done, EncodeError>);

/// Compresses all of `input` into `writer`, cut as `cuts` says, on `threads` threads and this one. What is all zero
/// becomes frames of zeros. `progress` is told how many bytes of the input are done.
///
/// # Errors
/// If the input can't be read, a frame can't be made, or the writer fails.
pub fn compress<W: Write>(
    input: &impl Input,
    cuts: &Cuts,
    codec: Codec,
    threads: NonZeroUsize,
    writer: &mut FrameWriter<W>,
    mut progress: impl FnMut(ByteLen),
) -> Result<(), EncodeError> {
    let (jobs, queue) = mpsc::channel::<(u64, Range<FileOffset>)>();
    let queue = Mutex::new(queue);
    thread::scope(|scope| {
        let (results, finished) = mpsc::channel::<Numbered>();
        for _ in 0..threads.get() {
            let (queue, results) = (&queue, results.clone());
            scope.spawn(move || work(input, codec, queue, &results));
        }
        drop(results);
        let mut order = Order { writer, zeros: ByteLen(0), waiting: BTreeMap::new(), next: 0 };
        let mut pieces = Pieces { input, cuts, at: FileOffset(0) };
        let mut sent = 0;
        let mut done = None;
        // Dropping the sender ends the workers, also after an error.
        let jobs = jobs;
        while done.is_none() {
            while sent - order.next < (threads.get() * IN_HAND) as u64 {
                match pieces.next()? {
                    None => {
                        done = Some(());
                        break;
                    }
                    Some(Piece::Zeros(length)) => order.add((sent, Ok(Done::Zeros(length))))?,
                    // The workers live as long as this function.
                    Some(Piece::Content(range)) => drop(jobs.send((sent, range))),
                }
                sent += 1;
            }
            if done.is_none() {
                order.take(&finished)?;
                progress(ByteLen(order.writer.position().0 + order.zeros.0));
            }
        }
        while order.next < sent {
            order.take(&finished)?;
            progress(ByteLen(order.writer.position().0 + order.zeros.0));
        }
        order.flush()
    })
}

fn work(
    input: &impl Input,
    codec: Codec,
    queue: &Mutex<mpsc::Receiver<(u64, Range<FileOffset>)>>,
    results: &mpsc::Sender<Numbered>,
) {
    let mut encoder = Encoder::new(codec);
    let mut bytes = Vec::new();
    loop {
        // The lock is held while a thread waits: the others wait for it instead.
        let Ok((number, range)) = queue.lock().recv() else { return };
        bytes.resize((range.end - range.start).get(), 0);
        let done = match (&mut encoder, input.read_into(&mut bytes, range.start)) {
            (_, Err(error)) => Err(EncodeError::Input { at: range.start, error }),
            _ if is_zero(&bytes) => Ok(Done::Zeros(ByteLen::of(bytes.len()))),
            (Ok(encoder), Ok(())) => encoder.encode(&bytes).map(Done::Frame),
            (Err(_), Ok(())) => {
                Err(EncodeError::Codec { length: ByteLen::of(bytes.len()), reason: "no memory".into() })
            }
        };
        if results.send((number, done)).is_err() {
            return;
        }
    }
}

/// Compares with zeros block by block, as fast as memory can be compared.
fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|block| *block == ZEROS[..block.len()])
}

enum Piece {
    Zeros(ByteLen),
    Content(Range<FileOffset>),
}

/// The input from its start to its end: holes as they are, and the rest frame by frame.
struct Pieces<'a, I> {
    input: &'a I,
    cuts: &'a Cuts,
    at: FileOffset,
}

impl<I: Input> Pieces<'_, I> {
    fn next(&mut self) -> Result<Option<Piece>, EncodeError> {
        let (at, end) = (self.at, FileOffset(self.cuts.length().0));
        if at >= end {
            return Ok(None);
        }
        let zeros = self.input.zeros_at(at).map_err(|error| EncodeError::Input { at, error })?;
        let known = FileOffset(at.0.saturating_add(zeros.0)).min(end);
        let (before, after) = self.cuts.around(at);
        // Whole frames of a hole only, so that the others begin where they should.
        let hole_end = if known == end { end } else { self.cuts.around(known).0 };
        debug_assert_eq!(before, at);
        if hole_end > at {
            self.at = hole_end;
            return Ok(Some(Piece::Zeros(hole_end - at)));
        }
        self.at = after;
        Ok(Some(Piece::Content(at..after)))
    }
}

/// Puts what the workers send back into the order of the input, and joins zeros.
struct Order<'a, W> {
    writer: &'a mut FrameWriter<W>,
    zeros: ByteLen,
    waiting: BTreeMap<u64, Done>,
    /// The number of the piece that is written next.
    next: u64,
}

impl<W: Write> Order<'_, W> {
    fn take(&mut self, finished: &mpsc::Receiver<Numbered>) -> Result<(), EncodeError> {
        let gone = || EncodeError::Codec { length: ByteLen(0), reason: "a thread has died".to_owned() };
        self.add(finished.recv().map_err(|_| gone())?)
    }

    fn add(&mut self, (number, done): Numbered) -> Result<(), EncodeError> {
        self.waiting.insert(number, done?);
        while let Some(done) = self.waiting.remove(&self.next) {
            self.next += 1;
            match done {
                Done::Zeros(length) => self.zeros += length,
                Done::Frame(frame) => {
                    self.flush()?;
                    self.writer.push(&frame)?;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), EncodeError> {
        self.writer.push_zeros(std::mem::take(&mut self.zeros))
    }
}
