//! Which processes are at the two ends of a unix socket. Nothing but the kernel's socket table tells
//! (sock_diag(7), linux/unix_diag.h), and `/proc/PID/fd` tells whose the ends are.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// A process, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub id: u32,
    /// Its name, e.g. `qemu-system-x86`.
    pub name: String,
    /// Whether it is stopped, as by SIGSTOP.
    pub stopped: bool,
}

impl Process {
    /// Looks at one; `None` if it is not there any more.
    #[must_use]
    pub fn find(id: u32) -> Option<Process> {
        // proc_pid_stat(5): the number, the name in parentheses, the state.
        let stat = fs::read(format!("/proc/{id}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let stopped = rest.trim_start().starts_with(['T', 't']);
        Some(Process { id, name: name.to_owned(), stopped })
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.id, self.name)
    }
}

/// Who is at a unix socket that has a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AtSocket {
    /// Who listens.
    pub listener: Option<Process>,
    /// Who is connected, without this process.
    pub clients: Vec<Process>,
}

impl AtSocket {
    /// Looks for them. What this process may not see is left out.
    #[must_use]
    pub fn find(path: &Path) -> AtSocket {
        let (Ok(meta), Ok(table)) = (fs::metadata(path), table()) else { return AtSocket::default() };
        // The kernel's own encoding of a device: 20 bits of minor number; inode numbers are cut.
        let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
        let low = |number: u64| u32::try_from(number & u64::from(u32::MAX)).unwrap_or_default();
        let name = (low(meta.ino()), low((major << 20) | minor));
        let here: Vec<&Entry> = table.iter().filter(|entry| entry.name == Some(name)).collect();
        let listening = here.iter().filter(|entry| entry.state == LISTEN).map(|entry| entry.inode);
        let clients = here.iter().filter(|entry| entry.state == ESTABLISHED).filter_map(|entry| entry.peer);
        let (listening, clients): (Vec<u32>, Vec<u32>) = (listening.collect(), clients.collect());
        let owners = owners(&[&listening[..], &clients[..]].concat());
        let of = |inodes: &[u32]| -> Vec<Process> {
            let ids = inodes.iter().filter_map(|inode| owners.get(inode));
            ids.filter(|id| **id != std::process::id()).filter_map(|id| Process::find(*id)).collect()
        };
        AtSocket { listener: of(&listening).into_iter().next(), clients: of(&clients) }
    }
}

/// The process at the other end of a connection: the one that has it now, or, where that can't be seen, the one that
/// listened.
pub(crate) fn peer(connection: &UnixStream) -> Option<u32> {
    let listened = nix::sys::socket::getsockopt(connection, sockopt::PeerCredentials).ok()?.pid();
    let listened = u32::try_from(listened).ok().filter(|id| *id != 0);
    let own = u32::try_from(fs::metadata(format!("/proc/self/fd/{}", connection.as_raw_fd())).ok()?.ino()).ok()?;
    let far = table().ok()?.into_iter().find(|entry| entry.inode == own)?.peer?;
    let has = |id: &u32| sockets_of(*id).any(|inode| inode == far);
    listened.filter(has).or_else(|| owners(&[far]).get(&far).copied()).or(listened)
}

/// A unix socket of the table.
#[derive(Debug)]
struct Entry {
    inode: u32,
    state: u8,
    /// Inode and device of its name.
    name: Option<(u32, u32)>,
    peer: Option<u32>,
}

const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// Asks the kernel for all unix sockets.
#[expect(clippy::host_endian_bytes, reason = "netlink(7) has the byte order of the host")]
fn table() -> io::Result<Vec<Entry>> {
    const BY_FAMILY: u16 = 20;
    const REQUEST_DUMP: u16 = 0x301;
    const SHOW_NAME_AND_PEER: u32 = 2 | 4;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    setsockopt(&netlink.as_fd(), sockopt::ReceiveTimeout, &TimeVal::seconds(2))?;
    let mut request = Vec::new();
    // nlmsghdr: length, type, flags, sequence, port.
    request.extend(40u32.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]);
    // unix_diag_req: family, protocol, padding, states, inode, what to show, cookie.
    request.extend([1, 0, 0, 0]);
    request.extend(u32::MAX.to_ne_bytes());
    request.extend([0; 4]);
    request.extend(SHOW_NAME_AND_PEER.to_ne_bytes());
    request.extend([0; 8]);
    send(netlink.as_raw_fd(), &request, MsgFlags::empty())?;
    let (mut entries, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        let n = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if !parse(buffer.get(..n).unwrap_or_default(), &mut entries)? || n == 0 {
            return Ok(entries);
        }
    }
}

/// Reads the messages of one answer; whether more follow.
fn parse(mut messages: &[u8], entries: &mut Vec<Entry>) -> io::Result<bool> {
    const ERROR: u16 = 2;
    const DONE: u16 = 3;
    while let (Some(length), Some(kind)) = (u32_at(messages, 0), u16_at(messages, 4)) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        match kind {
            DONE => return Ok(false),
            ERROR => return Err(io::ErrorKind::Unsupported.into()),
            _ => entries.extend(messages.get(16..length).and_then(entry)),
        }
        let next = length.checked_next_multiple_of(4).filter(|next| *next > 0);
        messages = next.and_then(|next| messages.get(next..)).unwrap_or_default();
    }
    Ok(true)
}

/// unix_diag_msg: family, type, state, padding, inode, cookie; then attributes.
fn entry(message: &[u8]) -> Option<Entry> {
    const NAME: u16 = 1;
    const PEER: u16 = 2;
    let mut entry = Entry { inode: u32_at(message, 4)?, state: *message.get(2)?, name: None, peer: None };
    let mut attributes = message.get(16..)?;
    while let (Some(length), Some(kind)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        match kind {
            NAME => entry.name = u32_at(attributes, 4).zip(u32_at(attributes, 8)),
            PEER => entry.peer = u32_at(attributes, 4),
            _ => {}
        }
        attributes = attributes.get(usize::from(length.max(4)).next_multiple_of(4)..).unwrap_or_default();
    }
    Some(entry)
}

#[expect(clippy::host_endian_bytes, reason = "netlink(7) has the byte order of the host")]
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[expect(clippy::host_endian_bytes, reason = "netlink(7) has the byte order of the host")]
fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The processes that have these sockets, as far as we may see.
fn owners(inodes: &[u32]) -> HashMap<u32, u32> {
    let mut found = HashMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for id in entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        for inode in sockets_of(id).filter(|inode| inodes.contains(inode)) {
            found.entry(inode).or_insert(id);
        }
    }
    found
}

fn sockets_of(process: u32) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn both_ends_of_a_socket_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert_eq!(AtSocket::find(&path), AtSocket::default());
        let listener = UnixListener::bind(&path).unwrap();
        // This process is not told.
        let near = UnixStream::connect(&path).unwrap();
        let far = listener.accept().unwrap().0;
        assert_eq!(AtSocket::find(&path), AtSocket::default());
        assert_eq!(peer(&near), Some(std::process::id()));
        // Another one has the client's end, as its input.
        let mut other = Command::new("cat").stdin(Stdio::from(std::os::fd::OwnedFd::from(near))).spawn().unwrap();
        let at = AtSocket::find(&path);
        assert_eq!(at.clients.iter().map(|process| process.id).collect::<Vec<_>>(), [other.id()]);
        assert_eq!(peer(&far), Some(other.id()));
        drop(far);
        other.wait().unwrap();
        assert_eq!(Process::find(other.id()), None);
    }

    #[test]
    fn answers_that_are_cut_off_are_no_trouble() {
        let bytes: Vec<u8> = (0..200u8).collect();
        for n in 0..bytes.len() {
            let _ = parse(&bytes[..n], &mut Vec::new());
            let _ = entry(&bytes[..n]);
            let _ = parse(&vec![0; n], &mut Vec::new());
        }
    }
}
