//! Commands, their answers, and events.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};
use serde_json::{Value, json};

use crate::processes::{self, AtSocket};
use crate::reader::{NoMessage, Reader};
use crate::{QmpAddress, QmpError};

/// Events kept until somebody asks; the oldest are dropped first.
const MOST_EVENTS: usize = 4096;

/// The first command of all.
const NEGOTIATION: &str = "qmp_capabilities";

/// How often a full queue of the socket is tried again: nothing tells when a place in it is free.
const AGAIN: Duration = Duration::from_millis(10);

/// Connects; `None` if no place was free in time: QEMU takes one client, and lets one wait.
fn connect_until(address: &QmpAddress, until: Instant) -> io::Result<Option<UnixStream>> {
    match address {
        QmpAddress::Unix(path) => connect_unix(path, until),
        QmpAddress::Tcp(host, port) => connect_tcp(host, *port, until).map(Some),
    }
}

fn connect_unix(path: &Path, until: Instant) -> io::Result<Option<UnixStream>> {
    // A name that is too long for an address is reached through its directory.
    let mut near = None;
    let address = match (UnixAddr::new(path), path.parent(), path.file_name()) {
        (Err(Errno::ENAMETOOLONG), Some(directory), Some(name)) => {
            let directory = near.insert(File::open(directory)?);
            UnixAddr::new(&Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name))?
        }
        (address, ..) => address?,
    };
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?;
    while let Err(error) = connect(fd.as_raw_fd(), &address) {
        if !matches!(error, Errno::EAGAIN | Errno::EINTR) {
            return Err(error.into());
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        std::thread::sleep(left.min(AGAIN));
    }
    let socket = UnixStream::from(fd);
    socket.set_nonblocking(false)?;
    Ok(Some(socket))
}

fn connect_tcp(host: &str, port: u16, until: Instant) -> io::Result<UnixStream> {
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now()).max(AGAIN);
        match TcpStream::connect_timeout(&address, left) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                // From here on it is a stream of bytes like the other kind, and read, written and closed alike.
                return Ok(UnixStream::from(OwnedFd::from(socket)));
            }
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Something that QEMU said unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, e.g. `RESUME`.
    pub name: String,
    /// Its data; null if it has none.
    pub data: Value,
    /// When it was taken from the socket.
    pub seen: Instant,
    /// When it happened, by QEMU's clock: the time since 1970.
    pub happened: Duration,
}

/// A connection to one QEMU. Dropping it closes the socket; QEMU goes on.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    reader: Reader,
    events: VecDeque<Event>,
    serial: u64,
    limit: Duration,
    version: (u64, u64, u64),
    out_of_band: bool,
    passes_fds: bool,
}

impl Qmp {
    /// Connects, waits for the greeting and leaves negotiation mode, all within `limit`, which also becomes the time
    /// limit of each command.
    ///
    /// # Errors
    /// If nothing answers there, or not in time (QEMU serves one client at a time): then with those who hold the socket.
    pub fn connect(address: &QmpAddress, limit: Duration) -> Result<Qmp, QmpError> {
        let until = Instant::now() + limit;
        let at = || address.to_string();
        let failed = |error| QmpError::Connect { at: at(), error: Arc::new(error) };
        let there = || address.path().map(AtSocket::find).unwrap_or_default();
        let Some(socket) = connect_until(address, until).map_err(failed)? else {
            return Err(QmpError::NoGreeting { at: at(), there: there() });
        };
        let mut qmp = Qmp::greeted(socket, until, limit).map_err(|error| match error {
            QmpError::Timeout { command, .. } if command == NEGOTIATION => {
                QmpError::Mute { at: at(), qemu: there().listener }
            }
            QmpError::Timeout { .. } | QmpError::Closed => QmpError::NoGreeting { at: at(), there: there() },
            other => other,
        })?;
        qmp.passes_fds = address.path().is_some();
        Ok(qmp)
    }

    /// The same over a socket that is connected already.
    ///
    /// # Errors
    /// If QEMU is not at the other end, or does not answer in time.
    pub fn over(socket: UnixStream, limit: Duration) -> Result<Qmp, QmpError> {
        Qmp::greeted(socket, Instant::now() + limit, limit)
    }

    fn greeted(socket: UnixStream, until: Instant, limit: Duration) -> Result<Qmp, QmpError> {
        socket.set_write_timeout(Some(limit)).map_err(|_| QmpError::Closed)?;
        let reader = socket.try_clone().and_then(Reader::start).map_err(|_| QmpError::Closed)?;
        let greeting = reader.next(until).map_err(|no| match no {
            NoMessage::TooLate => QmpError::Timeout { command: "the connection".into(), limit },
            NoMessage::Closed => QmpError::Closed,
        })?;
        let version = &greeting["QMP"]["version"]["qemu"];
        if version.is_null() {
            let reason = "it does not begin with a QMP greeting".into();
            return Err(QmpError::Answer { command: "the connection".into(), reason });
        }
        let part = |name: &str| version[name].as_u64().unwrap_or(0);
        let version = (part("major"), part("minor"), part("micro"));
        let offered = greeting["QMP"]["capabilities"].as_array();
        let out_of_band = offered.is_some_and(|list| list.iter().any(|name| name == "oob"));
        let enable = if out_of_band { json!({"enable": ["oob"]}) } else { json!({}) };
        let (events, passes_fds) = (VecDeque::new(), true);
        let mut qmp = Qmp { socket, reader, events, serial: 0, limit, version, out_of_band, passes_fds };
        qmp.execute(NEGOTIATION, enable)?;
        Ok(qmp)
    }

    /// Whether this connection takes commands out of band: QEMU then executes a few of them even while its main thread
    /// is held up (QEMU docs/interop/qmp-spec.rst, "Out-of-band execution").
    #[must_use]
    pub fn is_out_of_band(&self) -> bool {
        self.out_of_band
    }

    /// Whether descriptors can be passed over this connection: not over TCP.
    #[must_use]
    pub fn passes_fds(&self) -> bool {
        self.passes_fds
    }

    /// The process at the other end, as far as this one may see it: not over TCP, nor in another container.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        if self.passes_fds { processes::peer(&self.socket) } else { None }
    }

    /// The same connection, for another process to take over when this one has gone.
    ///
    /// # Errors
    /// The system's.
    pub fn share(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// Lets go of the connection without closing it, for the process that [shares](Qmp::share) it. What belongs to it here
    /// is freed when the process ends.
    pub fn leave_open(self) {
        std::mem::forget(self);
    }

    /// Changes the time limit of each command.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// QEMU's version: major, minor, micro.
    #[must_use]
    pub fn version(&self) -> (u64, u64, u64) {
        self.version
    }

    /// Sends a command and waits for its answer. Events that come meanwhile are kept.
    ///
    /// # Errors
    /// If QEMU refuses, goes away, or does not answer in time. After a time-out the late answer is thrown away.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_by("execute", command, &arguments)
    }

    /// The same, without QEMU's main thread where this connection [allows](Qmp::is_out_of_band) that. What the command
    /// begins does not need that thread either. Only few commands can be executed so.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn execute_out_of_band(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_by(if self.out_of_band { "exec-oob" } else { "execute" }, command, &arguments)
    }

    fn execute_by(&mut self, how: &str, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        let line = self.line(how, command, arguments);
        self.socket.write_all(line.as_bytes()).map_err(|_| QmpError::Closed)?;
        self.answer(command)
    }

    /// Gives QEMU a file descriptor, under a name that `fd:NAME` in a later command means. It belongs to this
    /// connection until it is used.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn pass_fd(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.execute_with("getfd", &json!({"fdname": name}), fd).map(drop)
    }

    /// Gives QEMU a file descriptor for good; its number in QEMU.
    ///
    /// # Errors
    /// As [`execute`](Qmp::execute).
    pub fn add_fd(&mut self, fd: BorrowedFd<'_>) -> Result<u64, QmpError> {
        const COMMAND: &str = "add-fd";
        let added = self.execute_with(COMMAND, &json!({"opaque": "fastload"}), fd)?;
        let reason = || QmpError::Answer { command: COMMAND.to_owned(), reason: "no number".to_owned() };
        added["fd"].as_u64().ok_or_else(reason)
    }

    fn execute_with(&mut self, command: &str, arguments: &Value, fd: BorrowedFd<'_>) -> Result<Value, QmpError> {
        let line = self.line("execute", command, arguments);
        let fds = [fd.as_raw_fd()];
        let (part, with) = ([IoSlice::new(line.as_bytes())], [ControlMessage::ScmRights(&fds)]);
        let sent = sendmsg::<()>(self.socket.as_raw_fd(), &part, &with, MsgFlags::MSG_NOSIGNAL, None);
        let sent = sent.map_err(|_| QmpError::Closed)?;
        self.socket.write_all(line.as_bytes().get(sent..).unwrap_or_default()).map_err(|_| QmpError::Closed)?;
        self.answer(command)
    }

    fn line(&mut self, how: &str, command: &str, arguments: &Value) -> String {
        self.serial += 1;
        format!("{}\n", json!({how: command, "arguments": arguments, "id": self.serial}))
    }

    fn answer(&mut self, command: &str) -> Result<Value, QmpError> {
        let until = Instant::now() + self.limit;
        loop {
            let mut message = match self.reader.next(until) {
                Ok(message) => message,
                Err(NoMessage::Closed) => return Err(QmpError::Closed),
                Err(NoMessage::TooLate) => {
                    return Err(QmpError::Timeout { command: command.to_owned(), limit: self.limit });
                }
            };
            if self.keep_event(&message) || message["id"] != self.serial {
                continue;
            }
            let refused = &message["error"];
            if !refused.is_null() {
                let text = |name: &str| refused[name].as_str().unwrap_or("(no reason given)").to_owned();
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    class: text("class"),
                    description: text("desc"),
                });
            }
            return Ok(message["return"].take());
        }
    }

    /// Waits for the next event with one of these names, and takes it; others are kept. `None` if none came in time.
    ///
    /// # Errors
    /// If QEMU goes away.
    pub fn wait_event(&mut self, names: &[&str], limit: Duration) -> Result<Option<Event>, QmpError> {
        let until = Instant::now() + limit;
        loop {
            if let Some(at) = self.events.iter().position(|event| names.contains(&event.name.as_str())) {
                return Ok(self.events.remove(at));
            }
            match self.reader.next(until) {
                Ok(message) => _ = self.keep_event(&message),
                Err(NoMessage::Closed) => return Err(QmpError::Closed),
                Err(NoMessage::TooLate) => return Ok(None),
            }
        }
    }

    /// Forgets the events that came so far.
    pub fn forget_events(&mut self) {
        while let Ok(message) = self.reader.next(Instant::now()) {
            self.keep_event(&message);
        }
        self.events.clear();
    }

    fn keep_event(&mut self, message: &Value) -> bool {
        let Some(name) = message["event"].as_str() else { return false };
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
        }
        let stamp = |unit: &str| message["timestamp"][unit].as_u64().unwrap_or(0);
        // A clock that fails says -1: no time then.
        let happened =
            Duration::from_secs(stamp("seconds")).saturating_add(Duration::from_micros(stamp("microseconds")));
        let event = Event { name: name.to_owned(), data: message["data"].clone(), seen: Instant::now(), happened };
        self.events.push_back(event);
        true
    }
}
