//! A connection into which several threads put whole messages, and which nobody waits for.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use page_units::ByteLen;
use parking_lot::Mutex;

use super::address::Socket;
use super::message::Message;
use super::sys;
use crate::PageBytes;

/// A message of which a part can't be read. The rest of it was not sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unreadable;

/// The sending half of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    socket: Socket,
    queue: Mutex<Queue>,
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

impl Queue {
    /// Copies a message from byte `skip` on.
    fn keep(&mut self, message: &Message<'_>, skip: usize) -> Result<(), Unreadable> {
        for part in message.parts(skip) {
            let before = self.bytes.len();
            self.bytes.resize(before + part.len().get(), 0);
            let to = self.bytes.get_mut(before..).unwrap_or_default();
            part.copy_to(to).map_err(|_| Unreadable)?;
        }
        Ok(())
    }
}

impl Channel {
    pub(super) fn new(socket: Socket) -> Channel {
        Channel {
            socket,
            queue: Mutex::default(),
            waiting: AtomicUsize::new(0),
            position: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Makes the socket of a unix connection writable once the peer has left no more than about `low` bytes in it.
    /// Returns at how many it will be, which the system may have limited.
    pub(super) fn writable_below(&self, low: ByteLen) -> ByteLen {
        // It is writable while a quarter of its buffer is taken or less (Linux, net/unix/af_unix.c, `unix_writable`),
        // and the kernel doubles the value that it is given.
        let _ = setsockopt(&self.socket, sockopt::SndBuf, &low.get().saturating_mul(2));
        ByteLen::of(getsockopt(&self.socket, sockopt::SndBuf).unwrap_or(0) / 4)
    }

    /// Bytes of a unix connection that the peer has not received, or some more.
    pub(super) fn unreceived(&self) -> u64 {
        // Fails only if it is no socket.
        self.kept() as u64 + sys::unreceived(self.socket.as_fd()).unwrap_or(0)
    }

    /// Puts bytes in, as [`send`](Self::send).
    pub(super) fn send_bytes(&self, bytes: Vec<u8>) {
        // Our own bytes can be read.
        let _ = self.send(&Message::plain(bytes));
    }

    /// Puts a message in. What the kernel does not take at once is kept, for [`flush`](Self::flush).
    ///
    /// # Errors
    /// If a lent page is gone. Nothing of the message was sent then, or else nothing will ever be sent any more.
    pub(super) fn send(&self, message: &Message<'_>) -> Result<(), Unreadable> {
        let mut queue = self.queue.lock();
        let mut done = 0;
        let mut read = Ok(());
        if queue.bytes.is_empty() && queue.error.is_none() {
            (done, read) = self.write(&mut queue, message);
        }
        if read.is_ok() && queue.error.is_none() {
            let before = queue.bytes.len();
            read = queue.keep(message, done);
            if read.is_err() {
                queue.bytes.truncate(before);
            }
        }
        match read {
            // The peer would take what comes next for the rest.
            Err(Unreadable) if done > 0 => self.fail(&mut queue, io::Error::other("a page can't be read any more")),
            Err(Unreadable) => {}
            Ok(()) => _ = self.position.fetch_add(message.len() as u64, Ordering::SeqCst),
        }
        self.waiting.store(queue.bytes.len() - queue.taken, Ordering::SeqCst);
        read
    }

    fn write(&self, queue: &mut Queue, message: &Message<'_>) -> (usize, Result<(), Unreadable>) {
        let mut done = 0;
        while done < message.len() && queue.error.is_none() {
            match sys::send(self.socket.as_fd(), message.parts(done)) {
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => return (done, Err(Unreadable)),
                sent => match self.sent(queue, sent) {
                    Some(n) => done += n,
                    None => break,
                },
            }
        }
        (done, Ok(()))
    }

    /// How many bytes went; `None` if there was no room.
    fn sent(&self, queue: &mut Queue, sent: io::Result<usize>) -> Option<usize> {
        match sent {
            Ok(0) => self.fail(queue, ErrorKind::WriteZero.into()),
            Ok(n) => return Some(n),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => self.fail(queue, error),
        }
        Some(0)
    }

    /// Sends what is kept, as far as the kernel takes it.
    pub(super) fn flush(&self) {
        let mut queue = self.queue.lock();
        if queue.bytes.is_empty() {
            return;
        }
        while queue.taken < queue.bytes.len() && queue.error.is_none() {
            let rest = PageBytes::from_slice(queue.bytes.get(queue.taken..).unwrap_or_default());
            let sent = sys::send(self.socket.as_fd(), std::iter::once(rest));
            match self.sent(&mut queue, sent) {
                Some(n) => queue.taken += n,
                None => break,
            }
        }
        if queue.taken == queue.bytes.len() || queue.error.is_some() {
            queue.bytes.clear();
            queue.taken = 0;
        }
        self.waiting.store(queue.bytes.len() - queue.taken, Ordering::SeqCst);
    }

    fn fail(&self, queue: &mut Queue, error: io::Error) {
        queue.error = Some(Arc::new(error));
        self.broken.store(true, Ordering::SeqCst);
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
