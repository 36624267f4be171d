//! Where a QMP monitor is, as people write it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The options of QEMU's `-qmp unix:PATH,...` and `-chardev socket,...` that may follow an address.
const OPTIONS: [&str; 9] =
    ["server", "wait", "nowait", "noserver", "reconnect", "pretty", "telnet", "websocket", "nodelay"];

/// The address of a QMP monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QmpAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP: host and port.
    Tcp(String, u16),
}

impl QmpAddress {
    /// Reads `PATH`, `unix:PATH` or `tcp:HOST:PORT`; of the latter two, QEMU's own options (`,server=on,wait=off`) are left
    /// out, and a comma of the path is written twice, as for QEMU.
    ///
    /// # Errors
    /// If it is none of them: what is expected.
    pub fn parse(text: &OsStr) -> Result<QmpAddress, String> {
        let bytes = text.as_bytes();
        if let Some(rest) = bytes.strip_prefix(b"unix:") {
            let (path, options) = split_options(rest);
            if options.iter().any(|option| option.starts_with("abstract")) {
                return Err("abstract unix sockets are not supported: give QEMU one with a path".to_owned());
            }
            return non_empty(path);
        }
        if let Some(rest) = bytes.strip_prefix(b"tcp:") {
            let (address, _) = split_options(rest);
            let address = String::from_utf8_lossy(&address).into_owned();
            let expected = || "expected tcp:HOST:PORT, e.g. tcp:localhost:4444".to_owned();
            let (host, port) = address.rsplit_once(':').ok_or_else(expected)?;
            let port = port.parse().map_err(|_| expected())?;
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let host = if matches!(host, "" | "0.0.0.0" | "::") { "localhost" } else { host };
            return Ok(QmpAddress::Tcp(host.to_owned(), port));
        }
        non_empty(bytes.to_vec())
    }

    /// The path of a unix socket.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            QmpAddress::Unix(path) => Some(path),
            QmpAddress::Tcp(..) => None,
        }
    }
}

impl From<&Path> for QmpAddress {
    fn from(path: &Path) -> QmpAddress {
        QmpAddress::Unix(path.to_owned())
    }
}

impl fmt::Display for QmpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QmpAddress::Unix(path) => write!(f, "{}", path.display()),
            QmpAddress::Tcp(host, port) if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            QmpAddress::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
        }
    }
}

fn non_empty(path: Vec<u8>) -> Result<QmpAddress, String> {
    if path.is_empty() {
        return Err("expected the path of a socket".to_owned());
    }
    Ok(QmpAddress::Unix(OsString::from_vec(path).into()))
}

/// Cuts at the first single comma that one of QEMU's options follows.
fn split_options(text: &[u8]) -> (Vec<u8>, Vec<String>) {
    let (mut value, mut at) = (Vec::new(), 0);
    while let Some(byte) = text.get(at) {
        if *byte == b',' {
            let rest = text.get(at + 1..).unwrap_or_default();
            if rest.first() == Some(&b',') {
                at += 1;
            } else {
                let options: Vec<String> =
                    rest.split(|byte| *byte == b',').map(|word| String::from_utf8_lossy(word).into_owned()).collect();
                let known = |option: &String| {
                    let name = option.split('=').next().unwrap_or_default();
                    OPTIONS.contains(&name) || matches!(name, "abstract" | "tight" | "ipv4" | "ipv6" | "to")
                };
                if options.iter().all(known) {
                    return (value, options);
                }
            }
        }
        value.push(*byte);
        at += 1;
    }
    (value, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, String> {
        QmpAddress::parse(OsStr::new(text)).map(|address| address.to_string())
    }

    #[test]
    fn qemus_own_spellings_are_understood() {
        for (text, expected) in [
            ("/run/vm.qmp", "/run/vm.qmp"),
            ("a:b,c", "a:b,c"),
            ("unix:/run/vm.qmp", "/run/vm.qmp"),
            ("unix:/run/vm.qmp,server=on,wait=off", "/run/vm.qmp"),
            ("unix:/run/vm.qmp,server,nowait", "/run/vm.qmp"),
            ("unix:/run/a,,b.qmp,server=on", "/run/a,b.qmp"),
            ("unix:/run/a,b.qmp", "/run/a,b.qmp"),
            ("tcp:localhost:4444", "tcp:localhost:4444"),
            ("tcp::4444,server=on,wait=off", "tcp:localhost:4444"),
            ("tcp:0.0.0.0:4444", "tcp:localhost:4444"),
            ("tcp:[::1]:4444", "tcp:[::1]:4444"),
        ] {
            assert_eq!(parsed(text).as_deref(), Ok(expected), "{text}");
        }
        for text in ["", "unix:", "tcp:4444x", "tcp:host", "tcp:host:99999", "unix:x,abstract=on"] {
            assert!(parsed(text).is_err(), "{text}");
        }
        let odd = OsStr::from_bytes(b"unix:/run/\xff");
        assert_eq!(QmpAddress::parse(odd), Ok(QmpAddress::Unix(OsStr::from_bytes(b"/run/\xff").into())));
    }
}
