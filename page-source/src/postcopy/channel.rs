//! A connection into which several threads put whole messages, and which nobody waits for.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use page_units::ByteLen;
use parking_lot::{Condvar, Mutex};

use super::address::Socket;

/// The sending half of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Socket,
    queue: Mutex<Queue>,
    drained: Condvar,
    /// Bytes in the queue.
    waiting: AtomicUsize,
    /// Bytes ever put in.
    position: AtomicU64,
    broken: AtomicBool,
}

/// What the kernel had no room for.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    taken: usize,
    error: Option<Arc<io::Error>>,
}

impl Channel {
    pub(super) fn new(socket: Socket) -> Channel {
        Channel {
            socket,
            queue: Mutex::default(),
            drained: Condvar::new(),
            waiting: AtomicUsize::new(0),
            position: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Limits what the kernel holds for the peer to about `limit`.
    pub(super) fn limit_buffer(&self, limit: ByteLen) {
        // The kernel doubles the value, for its own bookkeeping. A refusal only means another size.
        let _ = setsockopt(&self.socket, sockopt::SndBuf, &(limit.get() / 2));
    }

    /// Puts a message in. What the kernel does not take at once is kept, for [`flush`](Self::flush).
    pub(super) fn send(&self, message: &[u8]) {
        let mut queue = self.queue.lock();
        self.position.fetch_add(message.len() as u64, Ordering::SeqCst);
        let mut rest = message;
        if queue.bytes.is_empty() {
            let done = self.write(&mut queue, rest);
            rest = rest.get(done..).unwrap_or_default();
        }
        if queue.error.is_none() {
            queue.bytes.extend_from_slice(rest);
        }
        self.waiting.store(queue.bytes.len() - queue.taken, Ordering::SeqCst);
    }

    /// Sends what is kept, as far as the kernel takes it.
    pub(super) fn flush(&self) {
        let mut queue = self.queue.lock();
        if queue.bytes.is_empty() {
            return;
        }
        let (bytes, taken) = (std::mem::take(&mut queue.bytes), queue.taken);
        queue.taken += self.write(&mut queue, bytes.get(taken..).unwrap_or_default());
        queue.bytes = bytes;
        if queue.taken == queue.bytes.len() || queue.error.is_some() {
            queue.bytes.clear();
            queue.taken = 0;
        }
        self.waiting.store(queue.bytes.len() - queue.taken, Ordering::SeqCst);
        self.drained.notify_all();
    }

    fn write(&self, queue: &mut Queue, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty() && queue.error.is_none()) {
            match (&self.socket).write(rest) {
                Ok(0) => self.fail(queue, ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => self.fail(queue, error),
            }
        }
        done
    }

    fn fail(&self, queue: &mut Queue, error: io::Error) {
        queue.error = Some(Arc::new(error));
        self.broken.store(true, Ordering::SeqCst);
    }

    /// Waits, at most for a moment, while more than `limit` bytes are kept.
    pub(super) fn wait_below(&self, limit: ByteLen) {
        let mut queue = self.queue.lock();
        if queue.bytes.len() - queue.taken > limit.get() && queue.error.is_none() {
            self.drained.wait_for(&mut queue, Duration::from_millis(100));
        }
    }

    /// Bytes that the kernel did not take yet.
    pub(super) fn kept(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Bytes ever put in.
    pub(super) fn position(&self) -> u64 {
        self.position.load(Ordering::SeqCst)
    }

    /// Why nothing more can be sent.
    pub(super) fn error(&self) -> Option<Arc<io::Error>> {
        if !self.broken.load(Ordering::SeqCst) {
            return None;
        }
        self.queue.lock().error.clone()
    }
}
