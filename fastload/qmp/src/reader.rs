//! The thread that reads QEMU's lines.

use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;

/// The longest line taken from QEMU, in bytes. Real ones (the schema) stay below 1 MiB.
const LONGEST_LINE: u64 = 16 << 20;

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
    messages: Receiver<Value>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    pub(crate) fn start(socket: UnixStream) -> std::io::Result<Reader> {
        let (sender, messages) = channel();
        let from = socket.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || read_messages(BufReader::new(from), &sender))?;
        Ok(Reader { socket, messages, thread: Some(thread) })
    }

    pub(crate) fn next(&self, until: Instant) -> Result<Value, NoMessage> {
        let left = until.saturating_duration_since(Instant::now());
        self.messages.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => NoMessage::TooLate,
            RecvTimeoutError::Disconnected => NoMessage::Closed,
        })
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
fn read_messages(mut from: impl BufRead, to: &Sender<Value>) {
    let mut line = Vec::new();
    loop {
        line.clear();
        match from.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let Ok(message) = serde_json::from_slice(&line) else { return };
        if to.send(message).is_err() {
            return;
        }
    }
}
