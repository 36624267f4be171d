//! Where a QEMU waits.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;

/// The address at which a QEMU listens: `unix:PATH` or `tcp:HOST:PORT`, as in its `-incoming`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// Host (a name or an address; IPv6 in brackets) and port.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let expected = || format!("\"{text}\" is neither unix:PATH nor tcp:HOST:PORT");
        match text.split_once(':').ok_or_else(expected)? {
            ("unix", path) if !path.is_empty() => Ok(Address::Unix(path.into())),
            ("tcp", rest) => match rest.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Address::Tcp(rest.into())),
                _ => Err(expected()),
            },
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(host) => write!(f, "tcp:{host}"),
        }
    }
}

/// A connection that never blocks.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    pub(super) fn close(&self) {
        // Fails only if the peer has closed it already.
        let _ = match self {
            Socket::Unix(socket) => socket.shutdown(std::net::Shutdown::Both),
            Socket::Tcp(socket) => socket.shutdown(std::net::Shutdown::Both),
        };
    }

    pub(super) fn is_local(&self) -> bool {
        matches!(self, Socket::Unix(_))
    }
}

impl io::Read for &Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => (&*socket).read(into),
            Socket::Tcp(socket) => (&*socket).read(into),
        }
    }
}

impl io::Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => (&*socket).write(bytes),
            Socket::Tcp(socket) => (&*socket).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_qemu() {
        assert_eq!("unix:/run/a:b".parse(), Ok(Address::Unix("/run/a:b".into())));
        assert_eq!("tcp:[::1]:4444".parse(), Ok(Address::Tcp("[::1]:4444".into())));
        for wrong in ["", "unix:", "tcp:", "tcp:host", "tcp::1", "tcp:host:70000", "/run/a", "fd:3"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
        let there_and_back: Address = "tcp:localhost:1".parse().unwrap();
        assert_eq!(there_and_back.to_string(), "tcp:localhost:1");
    }
}
