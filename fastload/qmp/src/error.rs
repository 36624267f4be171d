//! What can go wrong between QEMU and us.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::{AtSocket, Process};

/// Why QEMU can't be asked, or did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket can't be reached.
    #[error("{at}: connecting to QEMU's QMP socket failed: {error}{}", spelling(at, error))]
    Connect {
        /// The socket.
        at: String,
        /// What the system said.
        #[source]
        error: Arc<io::Error>,
    },
    /// There is no greeting: QEMU talks to one client at a time.
    #[error("{at}: QEMU does not answer: {}", who(there))]
    NoGreeting {
        /// The socket.
        at: String,
        /// Who is there.
        there: AtSocket,
    },
    /// There is a greeting, and then nothing.
    #[error("{at}: QEMU greets, but does not answer: {}", why_mute(qemu.as_ref()))]
    Mute {
        /// The socket.
        at: String,
        /// The process, if that can be seen.
        qemu: Option<Process>,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, e.g. `GenericError`, `CommandNotFound`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// QEMU ended, or closed the socket.
    #[error("QEMU closed its QMP socket: it has ended (its standard error says why)")]
    Closed,
    /// There was no answer in time.
    #[error("QEMU did not answer {command} within {limit:?}")]
    Timeout {
        /// The command.
        command: String,
        /// The time limit.
        limit: Duration,
    },
    /// The answer makes no sense.
    #[error("QEMU's answer to {command} is not understood: {reason}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong.
        reason: String,
    },
}

/// How else it can be written, if nothing is there under this name.
fn spelling(at: &str, error: &io::Error) -> String {
    let host_and_port =
        at.rsplit_once(':').is_some_and(|(host, port)| !host.contains('/') && port.parse::<u16>().is_ok());
    match error.kind() {
        io::ErrorKind::NotFound if host_and_port && !at.starts_with("tcp:") => format!(" (for TCP: tcp:{at})"),
        _ => String::new(),
    }
}

fn who(there: &AtSocket) -> String {
    if let Some(qemu) = there.listener.as_ref().filter(|qemu| qemu.stopped) {
        return stopped(qemu);
    }
    match &there.clients[..] {
        [] => "another program holds this QMP socket, or it is not one".to_owned(),
        clients => {
            let clients: Vec<String> = clients.iter().map(Process::to_string).collect();
            format!(
                "{} holds this QMP socket, which takes one client at a time: give QEMU a second one (-qmp \
                 unix:PATH,server=on,wait=off, as often as you like), or end that process",
                clients.join(" and ")
            )
        }
    }
}

fn why_mute(qemu: Option<&Process>) -> String {
    match qemu {
        Some(qemu) if qemu.stopped => stopped(qemu),
        _ => "it is stopped, or its main thread is held up, perhaps by a page of guest memory that nobody brings"
            .to_owned(),
    }
}

fn stopped(qemu: &Process) -> String {
    format!("{qemu} is stopped (SIGSTOP); to let it go on: kill -CONT {}", qemu.id)
}

impl QmpError {
    /// Whether QEMU does not know the command at all.
    #[must_use]
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, QmpError::Refused { class, .. } if class == "CommandNotFound")
    }
}
