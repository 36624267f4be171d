//! The one command that has to work while QEMU's main thread is held up.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::QmpError;

const COMMAND: &str = "migrate-recover";

/// The longest message that is put together, in bytes.
const LONGEST: usize = 1 << 20;

/// How long to wait before the command is repeated that QEMU has refused.
const AGAIN: Duration = Duration::from_millis(20);

/// Tells a QEMU to listen at `uri` for the process that brings a guest the rest of its memory, over a connection on which
/// another process, which is gone, had enabled out-of-band execution ([`Qmp::is_out_of_band`](crate::Qmp::is_out_of_band)).
///
/// A guest that misses pages may hold QEMU's main thread up: a processor that takes an interrupt, or a device that reads
/// its ring, waits for its page while it holds the lock that the main thread wants. QEMU then takes no command but this,
/// and no new client.
///
/// # Errors
/// If QEMU is gone, or goes on refusing (it has not noticed that its connection broke, or needs nothing any more).
pub fn recover(socket: UnixStream, uri: &str, limit: Duration) -> Result<(), QmpError> {
    insist(&socket, "exec-oob", COMMAND, &json!({"uri": uri}), limit)
}

/// Starts a guest that was stopped, over a connection that another process, which is gone, had.
///
/// # Errors
/// If QEMU is gone, or goes on refusing.
pub fn resume(socket: UnixStream, limit: Duration) -> Result<(), QmpError> {
    insist(&socket, "execute", "cont", &json!({}), limit)
}

/// Gives a command until it is not refused.
fn insist(mut to: &UnixStream, how: &str, name: &str, arguments: &Value, limit: Duration) -> Result<(), QmpError> {
    let until = Instant::now() + limit;
    to.set_read_timeout(Some(AGAIN)).and_then(|()| to.set_write_timeout(Some(limit))).map_err(closed)?;
    let mut from = BufReader::new(to);
    let (mut line, mut messages, mut refused) = (Vec::new(), Messages::default(), None);
    for serial in 0.. {
        let id = json!(format!("recover {serial}"));
        let command = json!({how: name, "arguments": arguments, "id": id});
        to.write_all(format!("{command}\n").as_bytes()).map_err(closed)?;
        let begun = Instant::now();
        let mut answered = false;
        // A refusal is no reason to hurry.
        while Instant::now() < until && (!answered || begun.elapsed() < AGAIN) {
            match from.read_until(b'\n', &mut line) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(closed(error)),
            }
            let message = messages.next(&line);
            line.clear();
            let Some(message) = message.filter(|message| message["id"] == id) else {
                continue;
            };
            if message["error"].is_null() {
                return Ok(());
            }
            let text = |name: &str| message["error"][name].as_str().unwrap_or_default().to_owned();
            let (class, description) = (text("class"), text("desc"));
            refused = Some(QmpError::Refused { command: name.to_owned(), class, description });
            answered = true;
        }
        // What the last attempt has no answer to, an earlier one may have.
        if Instant::now() >= until {
            return Err(refused.unwrap_or(QmpError::Timeout { command: name.to_owned(), limit }));
        }
    }
    Err(QmpError::Closed)
}

/// Puts messages together from lines, of which the first may be the end of one whose beginning the other process has read.
/// A message begins with a line that begins with a brace, however QEMU prints it (`pretty=on`).
#[derive(Debug, Default)]
struct Messages {
    begun: Vec<u8>,
}

impl Messages {
    /// The message that ends with this line.
    fn next(&mut self, line: &[u8]) -> Option<Value> {
        if line.starts_with(b"{") {
            self.begun.clear();
        } else if self.begun.is_empty() {
            return None;
        }
        self.begun.extend_from_slice(line);
        match serde_json::from_slice(&self.begun) {
            Err(error) if error.is_eof() && self.begun.len() < LONGEST => None,
            parsed => {
                self.begun.clear();
                parsed.ok()
            }
        }
    }
}

fn closed(_: std::io::Error) -> QmpError {
    QmpError::Closed
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// A QEMU that refuses `refusals` times.
    fn qemu(socket: UnixStream, refusals: usize) -> std::io::Result<usize> {
        let mut to = socket.try_clone()?;
        // What the one before has left of a line, what was not for us, and what is no answer.
        write!(to, "0, \"event\": \"X\"}}\r\n{{\"return\": {{}}, \"id\": 7}}\r\n{{\"event\": \"STOP\"}}\r\n")?;
        write!(to, "{{\r\n    \"event\": {{\r\n    }}\r\n}}\r\n")?;
        let mut refused = 0;
        for line in BufReader::new(socket).lines() {
            let command: Value = serde_json::from_str(&line?)?;
            assert_eq!((&command["exec-oob"], &command["arguments"]["uri"]), (&json!(COMMAND), &json!("unix:x")));
            if refused == refusals {
                writeln!(to, "{:#}", json!({"return": {}, "id": command["id"]}))?;
                break;
            }
            refused += 1;
            let error = json!({"class": "GenericError", "desc": "not paused"});
            writeln!(to, "{}", json!({"error": error, "id": command["id"]}))?;
        }
        Ok(refused)
    }

    #[test]
    fn it_repeats_until_qemu_listens() {
        let (near, far) = UnixStream::pair().unwrap();
        let other = thread::spawn(move || qemu(far, 3));
        recover(near, "unix:x", LONG).unwrap();
        assert_eq!(other.join().unwrap().unwrap(), 3);
    }

    /// The last attempt may have no answer.
    #[test]
    fn what_qemu_refused_last_is_what_is_said() {
        let (near, far) = UnixStream::pair().unwrap();
        let other = thread::spawn(move || {
            let mut lines = BufReader::new(far.try_clone()?).lines();
            let command: Value = serde_json::from_str(&lines.next().unwrap()?)?;
            let error = json!({"class": "GenericError", "desc": "not paused"});
            writeln!(&far, "{}", json!({"error": error, "id": command["id"]}))?;
            Ok::<_, std::io::Error>(lines.count())
        });
        // Enough for one answer on a busy machine.
        let error = recover(near, "unix:x", Duration::from_secs(2)).unwrap_err();
        assert!(error.to_string().contains("not paused"), "{error}");
        assert!(other.join().unwrap().unwrap() > 0);
    }

    #[test]
    fn it_ends_with_qemu_and_in_time() {
        let (near, far) = UnixStream::pair().unwrap();
        let other = thread::spawn(move || qemu(far, usize::MAX));
        // Enough for one answer on a busy machine.
        let error = recover(near, "unix:x", Duration::from_secs(2)).unwrap_err();
        assert!(error.to_string().contains("not paused"), "{error}");
        assert!(other.join().unwrap().unwrap() > 0);
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        assert!(matches!(recover(near, "unix:x", LONG), Err(QmpError::Closed)));
    }
}
