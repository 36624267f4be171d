//! The thread that reads QEMU's lines.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;

/// The longest line taken from QEMU, in bytes. Real ones (the schema) stay below 1 MiB.
const LONGEST_LINE: u64 = 16 << 20;

/// What is kept until somebody asks, in messages and in bytes of their lines; the oldest are dropped first. While an
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
    /// With the lengths of their lines.
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

/// Ends with the stream, or with the first line that is not JSON.
fn read_messages(mut from: impl BufRead, to: &Inbox) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match from.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let Ok(message) = serde_json::from_slice(&line) else { return };
        to.put(line.len(), message);
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
