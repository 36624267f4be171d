//! A connection into which several threads put whole messages, and which nobody waits for.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use page_units::{ByteLen, Layout};
use parking_lot::Mutex;

use super::address::Socket;
use super::message::Message;
use super::sys;
use page_source::PageBytes;

/// The most bytes of pages kept for a peer that does not take them, or, if those are more, this number of its largest pages.
/// Each of its threads waits for one page at a time, so one that asks for more without taking any means no good.
const MOST_KEPT: u64 = 256 << 20;
const MOST_PAGES_KEPT: u64 = 1024;
/// How many bytes that went are kept at most before they are thrown away.
const GONE: usize = 1 << 20;

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

/// What did not fit into the kernel's buffer.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    taken: usize,
    /// How many may be in it.
    most: usize,
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
            queue: Mutex::new(Queue { most: ByteLen(MOST_KEPT).get(), ..Queue::default() }),
            waiting: AtomicUsize::new(0),
            position: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// The same for a peer with pages of these sizes.
    pub(super) fn to(socket: Socket, layout: &Layout) -> Channel {
        let largest = layout.blocks().iter().map(|block| block.page_size().bytes().0).max().unwrap_or(0);
        let channel = Channel::new(socket);
        channel.queue.lock().most = ByteLen(MOST_KEPT.max(MOST_PAGES_KEPT.saturating_mul(largest))).get();
        channel
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
        // They are not what the peer asks for.
        self.queue.lock().most += bytes.len();
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
        if queue.bytes.len() - queue.taken > queue.most && queue.error.is_none() {
            self.fail(&mut queue, io::Error::other("it asks for more and more pages, and takes none"));
        }
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

    /// How many bytes went; `None` if the buffer was full.
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
        } else if queue.taken >= GONE.max(queue.bytes.len() / 2) {
            let taken = std::mem::take(&mut queue.taken);
            queue.bytes.drain(..taken);
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_peer_that_takes_nothing_can_not_make_it_grow_without_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let channel = Channel::new(Socket::Unix(near));
        channel.queue.lock().most = 4 << 20;
        // Our own bytes do not count, however many they are.
        channel.send_bytes(vec![1; 8 << 20]);
        let piece = vec![2; 1 << 20];
        let mut pieces = 0;
        while channel.error().is_none() {
            channel.send(&Message::plain(piece.clone())).unwrap_or_else(|_| unreachable!());
            pieces += 1;
            assert!(channel.kept() <= 13 << 20 && pieces < 20, "{}", channel.kept());
        }
        assert!(pieces >= 5, "only {pieces} pieces");

        // What went is not kept, though it is never empty.
        let (near, mut other) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let channel = Channel::new(Socket::Unix(near));
        let mut taken = vec![0; 1 << 20];
        for _ in 0..4 {
            channel.send_bytes(piece.clone());
        }
        for _ in 0..50 {
            channel.send_bytes(piece.clone());
            let mut left = taken.len();
            while left > 0 {
                left -= other.read(&mut taken[..left]).unwrap();
                channel.flush();
            }
            assert!(channel.kept() > 0);
        }
        assert!(channel.queue.lock().bytes.len() <= 8 << 20);
        other.read_exact(&mut taken[..4096]).unwrap();
        assert_eq!(taken[..4096], [2; 4096]);
        far.read_exact(&mut taken[..4096]).unwrap();
        assert_eq!(taken[..4096], [1; 4096]);
    }
}
