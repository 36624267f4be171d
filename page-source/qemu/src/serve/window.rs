//! How much of the background lies between us and the destination, where a request has to wait behind it.
//!
//! On a unix socket the kernel tells what the destination has not received. On TCP it doesn't: there a PING goes after
//! each message, and its PONG says that everything before it was taken.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_units::{ByteLen, PAGE_SIZE, PageCount};
use parking_lot::Mutex;

use super::channel::{Channel, Unreadable};
use super::credit::Credit;
use super::message::Message;

/// The part of the window that the destination may still have to take when the next piece goes: it must have something
/// to do until that comes, or it goes to sleep, and waking it costs more than the piece.
const LOW: u64 = 2;
/// On TCP a piece is such a part of the window.
const PIECES: u64 = 4;
/// More than what a message has around its pages and their headers.
const AROUND: u64 = 512;
/// The header of a page.
const HEADER: u64 = 8;
/// A PING: who answers it has taken it, too.
const PING: u64 = 9;

#[derive(Debug)]
pub(super) struct Window {
    limit: u64,
    narrow: AtomicBool,
    /// A unix socket is writable if there is not more than this in it.
    low: AtomicU64,
    /// For TCP.
    credit: Option<Credit>,
    /// Held while a message with a PING is put in, so that its position is right.
    pinging: Mutex<()>,
}

impl Window {
    pub(super) fn new(main: &Channel, limit: ByteLen) -> Window {
        let credit = (!main.socket().is_local()).then(Credit::default);
        let (narrow, low) = (AtomicBool::new(false), AtomicU64::new(0));
        let window = Window { limit: limit.0, narrow, low, credit, pinging: Mutex::default() };
        window.watch(main);
        window
    }

    /// Keeps less under way, or as much as allowed again.
    pub(super) fn set_narrow(&self, main: &Channel, narrow: bool) {
        if self.narrow.swap(narrow, Ordering::SeqCst) != narrow {
            self.watch(main);
        }
    }

    /// Sees to it that the socket is writable as soon as the next piece may go.
    fn watch(&self, main: &Channel) {
        if self.credit.is_none() {
            self.low.store(main.writable_below(ByteLen(self.size() / LOW)).0, Ordering::SeqCst);
        }
    }

    fn size(&self) -> u64 {
        if self.narrow.load(Ordering::SeqCst) { self.limit / 4 } else { self.limit }
    }

    /// How many pages make a piece: on a unix socket as many as fit in addition to what may be under way already, on TCP so few
    /// that some are confirmed while others are under way.
    pub(super) fn piece(&self) -> PageCount {
        let part = if self.credit.is_none() { self.size() - self.size() / LOW } else { self.size() / PIECES };
        PageCount((part.saturating_sub(AROUND) / (PAGE_SIZE + HEADER)).max(1))
    }

    /// Bytes that the destination has not taken.
    fn under_way(&self, main: &Channel) -> u64 {
        match &self.credit {
            Some(credit) => credit.under_way(main.position()),
            None => main.unreceived(),
        }
    }

    /// Whether `pages` may be added to what is under way, and to the `coming` ones.
    pub(super) fn has_room(&self, main: &Channel, pages: PageCount, coming: PageCount) -> bool {
        let more = (pages + coming).0 * (PAGE_SIZE + HEADER) + AROUND;
        let under_way = self.under_way(main);
        // A huge page may be longer than all of it.
        under_way + more <= self.size() || (coming.0 == 0 && under_way <= self.low.load(Ordering::SeqCst))
    }

    /// Whether the socket is writable when there is space again.
    pub(super) fn is_room_writable(&self) -> bool {
        self.credit.is_none()
    }

    /// Waits, at most for a moment, for space.
    pub(super) fn wait(&self, main: &Channel) {
        const MOMENT: Duration = Duration::from_millis(100);
        match &self.credit {
            Some(credit) => credit.wait(MOMENT),
            None => {
                let mut socket = [PollFd::new(main.socket().as_fd(), PollFlags::POLLOUT)];
                // Interrupted or not: the caller looks again.
                let _ = poll(&mut socket, PollTimeout::try_from(MOMENT).unwrap_or(PollTimeout::ZERO));
            }
        }
    }

    /// Sends a message of the RAM section, so that it is known when it was taken.
    pub(super) fn send(&self, main: &Channel, mut message: Message<'_>) -> Result<(), Unreadable> {
        let Some(credit) = &self.credit else { return main.send(&message) };
        let _in_order = self.pinging.lock();
        let number = credit.ping(main.position() + message.len() as u64 + PING);
        message.own().extend_from_slice(&[vmstate::kind::COMMAND, 0, 2, 0, 4]);
        message.own().extend_from_slice(&number.to_be_bytes());
        main.send(&message)
    }

    /// What was put in so far is no part of the background. It has no PINGs of ours that could confirm it, and a source
    /// that is held up until it is confirmed might be the one that the destination waits for meanwhile.
    pub(super) fn begin(&self, main: &Channel) {
        if let Some(credit) = &self.credit {
            credit.confirm(main.position());
        }
    }

    /// Whether this PONG was for one of our own PINGs.
    pub(super) fn pong(&self, number: u32) -> bool {
        self.credit.as_ref().is_some_and(|credit| credit.pong(number))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::super::address::Socket;
    use super::*;

    fn writable(main: &Channel) -> bool {
        let mut socket = [PollFd::new(main.socket().as_fd(), PollFlags::POLLOUT)];
        poll(&mut socket, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn a_unix_socket_never_holds_more_and_is_writable_when_there_is_room() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let main = Channel::new(Socket::Unix(near));
        let window = Window::new(&main, ByteLen(256 << 10));
        let mut bytes = vec![0; 4096];
        for (narrow, limit) in [(false, 256 << 10), (true, 64 << 10), (false, 256 << 10)] {
            window.set_narrow(&main, narrow);
            let piece = window.piece();
            let length = usize::try_from(piece.0 * (PAGE_SIZE + HEADER)).unwrap();
            let mut pieces = 0;
            for _ in 0..300 {
                while window.has_room(&main, piece, PageCount(0)) {
                    assert!(window.send(&main, Message::plain(vec![7; length])).is_ok());
                    pieces += 1;
                    assert!(main.unreceived() <= limit + 2 * AROUND && main.kept() == 0, "{}", main.unreceived());
                }
                // Or else a thread that waits for space would not wait.
                assert!(!writable(&main));
                while !writable(&main) {
                    far.read_exact(&mut bytes).unwrap();
                }
                assert!(window.has_room(&main, piece, PageCount(0)));
                assert!(main.unreceived() > 0, "the destination has nothing to do");
            }
            assert!(pieces >= 299);
        }
        // What is still to come from elsewhere counts too.
        assert!(!window.has_room(&main, PageCount(16), PageCount(64)));
    }
    #[test]
    fn over_credit_a_narrow_window_waits_until_little_enough_is_confirmed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        let main = Channel::new(Socket::Tcp(near));
        let limit = 256 << 10;
        let window = Window::new(&main, ByteLen(limit));
        main.send_bytes(vec![1; 300 << 10]);
        assert!(!window.has_room(&main, PageCount(1), PageCount(0)));
        // What comes before the background is no part of it.
        window.begin(&main);
        let length = |pages: PageCount| usize::try_from(pages.0 * (PAGE_SIZE + HEADER)).unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut far, &mut std::io::sink()).unwrap());

        let wide = window.piece();
        let mut ends = Vec::new();
        while window.has_room(&main, wide, PageCount(0)) {
            assert!(window.send(&main, Message::plain(vec![7; length(wide)])).is_ok());
            ends.push(main.position());
            main.flush();
        }
        let under_way = |window: &Window| window.under_way(&main);
        assert!(under_way(&window) <= limit + AROUND && under_way(&window) > limit / 2);
        let ping = |at: usize| (1 << 31) | u32::try_from(at + 1).unwrap();

        window.set_narrow(&main, true);
        let narrow = window.piece();
        assert!(narrow < wide);
        for at in 0..ends.len() {
            assert_eq!(
                window.has_room(&main, narrow, PageCount(0)),
                under_way(&window) + (narrow.0 * (PAGE_SIZE + HEADER)) + AROUND <= limit / 4
            );
            assert!(window.pong(ping(at)) && !window.pong(ping(at)));
            assert_eq!(under_way(&window), ends.last().unwrap() - ends[at]);
        }
        let mut pieces = 0;
        while window.has_room(&main, narrow, PageCount(0)) {
            assert!(window.send(&main, Message::plain(vec![7; length(narrow)])).is_ok());
            pieces += 1;
        }
        // Less than that, but more than one, so that one is confirmed while another is under way.
        assert!(under_way(&window) <= limit / 4 + AROUND && pieces > 1, "{pieces}: {}", under_way(&window));
        assert!(!window.has_room(&main, PageCount(0), PageCount(16)));
        window.set_narrow(&main, false);
        assert!(window.has_room(&main, wide, PageCount(0)));
        while main.kept() > 0 {
            main.flush();
        }
        main.socket().close();
        assert_eq!(reader.join().unwrap(), main.position());
    }
}
