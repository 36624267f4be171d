//! The thread that reads QEMU's lines.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;

/// The longest message taken from QEMU, in bytes. Real ones (the schema) stay below 1 MiB.
const LONGEST: u64 = 16 << 20;

/// What is kept until somebody asks, in messages and in their bytes; the oldest are dropped first. While an
/// answer is waited for, all is taken as it comes: these are events that nobody wants.
const MOST_MESSAGES: usize = 4096;
const MOST_BYTES: usize = 64 << 20;

/// Why there is no next message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoMessage {
    TooLate,
    Closed,
}

/// Owns the thread; dropping it closes the socket and joins.
#[derive(Debug)]
pub(crate) struct Reader {
    socket: UnixStream,
    inbox: Arc<Inbox>,
    thread: Option<JoinHandle<()>>,
}

/// What came and was not taken.
#[derive(Debug, Default)]
struct Inbox {
    kept: Mutex<Kept>,
    came: Condvar,
}

#[derive(Debug, Default)]
struct Kept {
    /// With their lengths.
    messages: VecDeque<(usize, Value)>,
    bytes: usize,
    closed: bool,
}

impl Inbox {
    fn put(&self, length: usize, message: Value) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.bytes += length;
        kept.messages.push_back((length, message));
        while kept.messages.len() > MOST_MESSAGES || (kept.bytes > MOST_BYTES && kept.messages.len() > 1) {
            kept.take();
        }
        self.came.notify_one();
    }

    fn close(&self) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.came.notify_one();
    }
}

impl Kept {
    fn take(&mut self) -> Option<Value> {
        let (length, message) = self.messages.pop_front()?;
        self.bytes -= length;
        Some(message)
    }
}

impl Reader {
    pub(crate) fn start(socket: UnixStream) -> std::io::Result<Reader> {
        let inbox = Arc::<Inbox>::default();
        let (from, to) = (socket.try_clone()?, Arc::clone(&inbox));
        let thread = std::thread::Builder::new().name("qmp".into()).spawn(move || {
            read_messages(BufReader::new(from), &to);
            to.close();
        })?;
        Ok(Reader { socket, inbox, thread: Some(thread) })
    }

    pub(crate) fn next(&self, until: Instant) -> Result<Value, NoMessage> {
        let mut kept = self.inbox.kept.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(message) = kept.take() {
                return Ok(message);
            }
            let left = until.saturating_duration_since(Instant::now());
            if kept.closed || left.is_zero() {
                return Err(if kept.closed { NoMessage::Closed } else { NoMessage::TooLate });
            }
            kept = self.inbox.came.wait_timeout(kept, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Fails only if QEMU has gone: then the thread ends by itself.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Ends with the stream, or with the first that is not JSON. A message may span lines (`pretty=on`).
fn read_messages(from: impl BufRead, to: &Inbox) {
    let length = Cell::new(0);
    let measured = Measured { from, length: &length };
    for message in serde_json::Deserializer::from_reader(measured).into_iter() {
        let Ok(message) = message else { return };
        to.put(usize::try_from(length.replace(0)).unwrap_or(usize::MAX), message);
    }
}

/// Counts the bytes of a message, which may not be longer than [`LONGEST`].
struct Measured<'a, R> {
    from: R,
    length: &'a Cell<u64>,
}

impl<R: Read> Read for Measured<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let n = self.from.read(into)?;
        self.length.set(self.length.get() + n as u64);
        if self.length.get() > LONGEST { Err(std::io::ErrorKind::InvalidData.into()) } else { Ok(n) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(inbox: &Inbox) -> Vec<u64> {
        let mut kept = inbox.kept.lock().unwrap();
        std::iter::from_fn(|| kept.take()).map(|message| message["event"].as_u64().unwrap()).collect()
    }

    #[test]
    fn what_nobody_takes_is_dropped_from_the_oldest_on() {
        let inbox = Inbox::default();
        let lines: String = (0..10_000).map(|n| format!("{{\"event\": {n}}}\n")).collect();
        read_messages(lines.as_bytes(), &inbox);
        assert!(numbers(&inbox).into_iter().eq(10_000 - 4096..10_000));
        assert_eq!(inbox.kept.lock().unwrap().bytes, 0);

        // Few, but long.
        let padding = "x".repeat(8 << 20);
        let lines: String = (0..20).map(|n| format!("{{\"event\": {n}, \"data\": \"{padding}\"}}\n")).collect();
        read_messages(lines.as_bytes(), &inbox);
        assert_eq!(numbers(&inbox), (13..20).collect::<Vec<u64>>());
    }

    #[test]
    fn messages_may_span_lines_and_share_them() {
        let inbox = Inbox::default();
        let pretty = "{\r\n    \"event\": 1,\r\n    \"data\": {\r\n        \"a\": [\r\n        ]\r\n    }\r\n}\r\n";
        read_messages(format!("{pretty}{{\"event\": 2}}{{\"event\": 3}}\n\n{pretty}x").as_bytes(), &inbox);
        assert_eq!(numbers(&inbox), [1, 2, 3, 1]);
        // One that never ends is given up.
        let inbox = Inbox::default();
        let endless = std::iter::repeat_n(b'[', 100).chain(std::iter::repeat_n(b' ', 17 << 20)).collect::<Vec<u8>>();
        read_messages(&endless[..], &inbox);
        assert_eq!(numbers(&inbox), [0; 0]);
    }

    #[test]
    fn what_came_before_the_end_is_still_there() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let reader = Reader::start(near).unwrap();
        std::io::Write::write_all(&mut far, b"{\"event\": 1}\n{\"event\": 2}\n").unwrap();
        drop(far);
        let soon = Instant::now() + std::time::Duration::from_secs(20);
        assert_eq!(reader.next(soon).unwrap()["event"], 1);
        assert_eq!(reader.next(soon).unwrap()["event"], 2);
        assert_eq!(reader.next(soon), Err(NoMessage::Closed));
    }
}
