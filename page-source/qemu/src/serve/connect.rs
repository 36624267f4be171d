//! Connecting, which may take for ever: a unix socket whose queue is full, or a host that says nothing, answers to nobody.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, connect, getsockopt, setsockopt,
    socket, sockopt,
};

use super::address::{Address, Socket};
use super::options::Shared;

/// How often a full queue of a unix socket, or a name that is not known yet, is tried again: neither wakes a
/// `poll`.
const AGAIN: Duration = Duration::from_millis(10);

/// How long a TCP connection may be idle before its peer is asked whether it is still there, how often it is asked
/// again, and how often altogether.
const IDLE: Duration = Duration::from_secs(10);
const ASKED_AGAIN: Duration = Duration::from_secs(5);
const ASKED: u32 = 10;

/// How long a TCP peer may leave unconfirmed what was sent to it, or take no more (Linux `tcp(7)`,
/// `TCP_USER_TIMEOUT`). Without, the system waits for a quarter of an hour. It applies to an idle connection as well, so
/// the three above come to the same.
const UNCONFIRMED: Duration = Duration::from_secs(60);

/// Connects within a time limit, which [`Control::stop`](super::Control::stop) ends as well.
pub(super) struct Connector<'a> {
    pub(super) shared: &'a Shared,
    pub(super) until: Instant,
}

impl Connector<'_> {
    /// A connection that never blocks.
    ///
    /// # Errors
    /// What the system says; [`TimedOut`](ErrorKind::TimedOut) with what it means; [`Interrupted`](ErrorKind::Interrupted)
    /// if the server was stopped.
    pub(super) fn connect(&self, to: &Address) -> io::Result<Socket> {
        match to {
            Address::Unix(path) => self.unix(path),
            Address::Tcp(host) => self.tcp(host),
        }
    }

    fn unix(&self, path: &Path) -> io::Result<Socket> {
        let address = UnixAddr::new(path)?;
        loop {
            let fd = open(AddressFamily::Unix)?;
            match connect(fd.as_raw_fd(), &address) {
                Ok(()) => return Ok(Socket::Unix(UnixStream::from(fd))),
                // The queue of the listener is full.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let what = "nobody accepts the connection: is another program connected there?";
            self.pause(None, AGAIN.min(self.left(self.until, what)?));
        }
    }

    fn tcp(&self, host: &str) -> io::Result<Socket> {
        let addresses = self.resolve(host)?;
        let mut failed = io::Error::new(ErrorKind::NotFound, "the host has no address");
        for (tried, address) in addresses.iter().enumerate() {
            // One that does not answer leaves time for the others.
            let others = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
            let until = Instant::now() + self.until.saturating_duration_since(Instant::now()) / others;
            match self.tcp_at(*address, until) {
                Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
                Err(error) => failed = error,
                Ok(socket) => return Ok(socket),
            }
        }
        Err(failed)
    }

    fn tcp_at(&self, address: SocketAddr, until: Instant) -> io::Result<Socket> {
        let address = SockaddrStorage::from(address);
        let fd = open(address.family().unwrap_or(AddressFamily::Inet))?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {}
            // It goes on by itself when it was interrupted, too.
            Err(Errno::EINPROGRESS | Errno::EINTR) => self.connected(&fd, until)?,
            Err(error) => return Err(error.into()),
        }
        let socket = TcpStream::from(fd);
        socket.set_nodelay(true)?;
        notice_its_end(&socket)?;
        Ok(Socket::Tcp(socket))
    }

    fn connected(&self, fd: &OwnedFd, until: Instant) -> io::Result<()> {
        loop {
            let mut there = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut there, PollTimeout::ZERO)? > 0 {
                return match getsockopt(fd, sockopt::SocketError)? {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(error)),
                };
            }
            let what = "the host does not answer: is it up, and does a firewall let us through?";
            self.pause(Some(fd), self.left(until, what)?);
        }
    }

    /// The addresses of a host. The system's resolver has time limits of its own, so somebody else waits for it.
    fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let (sender, receiver) = channel();
        let name = host.to_owned();
        thread::Builder::new().name("resolve".into()).spawn(move || {
            // Nobody is there any more only if it took too long.
            let _ = sender.send(name.to_socket_addrs().map(Iterator::collect));
        })?;
        loop {
            match receiver.recv_timeout(AGAIN) {
                Ok(addresses) => return addresses,
                Err(RecvTimeoutError::Disconnected) => return Err(ErrorKind::NotFound.into()),
                Err(RecvTimeoutError::Timeout) => _ = self.left(self.until, "the host's name is not resolved")?,
            }
        }
    }

    /// The time that is left.
    fn left(&self, until: Instant, what: &str) -> io::Result<Duration> {
        if self.shared.is_stopped() {
            return Err(ErrorKind::Interrupted.into());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::Error::new(ErrorKind::TimedOut, what)) } else { Ok(left) }
    }

    /// Waits for a connection, at most so long, or until the server is stopped.
    fn pause(&self, fd: Option<&OwnedFd>, longest: Duration) {
        let bell = &self.shared.session;
        bell.listen();
        if !self.shared.is_stopped() {
            let mut fds = vec![PollFd::new(bell.fd(), PollFlags::POLLIN)];
            fds.extend(fd.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLOUT)));
            // A wait of less than a millisecond would be none.
            let longest = longest.max(Duration::from_millis(1));
            // Interrupted or not: everything is looked at again.
            let _ = poll(&mut fds, PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX));
        }
        bell.hush();
    }
}

fn open(family: AddressFamily) -> nix::Result<OwnedFd> {
    socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
}

/// Lets the system find out that the peer's machine is gone: it says nothing when that happens.
fn notice_its_end(socket: &TcpStream) -> io::Result<()> {
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &seconds(IDLE))?;
    setsockopt(socket, sockopt::TcpKeepInterval, &seconds(ASKED_AGAIN))?;
    setsockopt(socket, sockopt::TcpKeepCount, &ASKED)?;
    let unconfirmed = u32::try_from(UNCONFIRMED.as_millis()).unwrap_or(u32::MAX);
    Ok(setsockopt(socket, sockopt::TcpUserTimeout, &unconfirmed)?)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::options::Control;
    use super::*;

    #[test]
    fn the_end_of_a_machine_is_noticed() {
        let control = Control::new().unwrap();
        let connector = Connector { shared: &control.shared, until: Instant::now() + Duration::from_secs(60) };
        for host in ["127.0.0.1:0", "[::1]:0"] {
            // A machine may be without IPv6.
            let Ok(listener) = TcpListener::bind(host) else { continue };
            let address = Address::Tcp(listener.local_addr().unwrap().to_string());
            let Socket::Tcp(socket) = connector.connect(&address).unwrap() else { panic!("{address}") };
            assert!(getsockopt(&socket, sockopt::KeepAlive).unwrap());
            assert_eq!(getsockopt(&socket, sockopt::TcpKeepIdle).unwrap(), 10);
            assert_eq!(getsockopt(&socket, sockopt::TcpKeepInterval).unwrap(), 5);
            assert_eq!(getsockopt(&socket, sockopt::TcpKeepCount).unwrap(), 10);
            assert_eq!(getsockopt(&socket, sockopt::TcpUserTimeout).unwrap(), 60_000);
            assert!(socket.nodelay().unwrap());
        }
    }
}
