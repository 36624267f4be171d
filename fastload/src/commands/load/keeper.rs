//! A second process that does one thing, should this one be killed: it tells QEMU to listen for whoever recovers the
//! guest. It has to be done from this connection. A guest that misses pages may hold up QEMU's main thread, and then
//! nobody else is heard any more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use fastload_qmp::Qmp;

use crate::commands::{Failure, serving};

/// How long QEMU may take to notice that its connection is gone.
const NOTICE: Duration = Duration::from_secs(10);

/// The process. It stays if this one ends, however that is.
#[derive(Debug)]
pub(super) struct Keeper(Child);

impl Keeper {
    /// Starts it, which takes about as long as a guest's start, while something else is `done` with QEMU. Nothing if this
    /// QEMU does not know commands out of band; that there can't be such a process is said.
    pub(super) fn start_while<T>(qmp: &mut Qmp, uri: &str, done: impl FnOnce(&mut Qmp) -> T) -> (T, Option<Keeper>) {
        if !qmp.is_out_of_band() {
            return (done(qmp), None);
        }
        let connection = qmp.share();
        thread::scope(|scope| {
            let spawned = connection.and_then(|connection| {
                let thread = thread::Builder::new().name("stand-by".into());
                thread.spawn_scoped(scope, move || spawn(connection, uri))
            });
            let done = done(qmp);
            let spawned = spawned.and_then(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())));
            let failed = |error: &io::Error| {
                serving::note(&format!(
                    "should this be killed, QEMU may not be heard again: no process can stand by: {error}"
                ));
            };
            (done, spawned.inspect_err(failed).ok().map(Keeper))
        })
    }

    /// It is not needed: the guest has everything, or is gone.
    pub(super) fn dismiss(mut self) {
        // Fails only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(connection: OwnedFd, uri: &str) -> io::Result<Child> {
    // This very program, even if there is another one under its name by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("fastload").arg("stand-by").arg(uri);
    // Its input ends with us. Ctrl-C is not for it.
    command.stdin(Stdio::piped()).stdout(connection).stderr(Stdio::null()).process_group(0);
    command.spawn()
}

/// Wait for the end of the process that began this one. Not for people.
#[derive(Debug, clap::Args)]
pub(crate) struct StandBy {
    /// Where QEMU is to listen then.
    uri: String,
}

impl StandBy {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        // Whoever asks all processes of a service to end, asks the other one, which may need a while.
        ctrlc::set_handler(|| {})?;
        io::copy(&mut io::stdin().lock(), &mut io::sink())?;
        let socket = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(fastload_qmp::recover(socket, &self.uri, NOTICE)?)
    }
}
