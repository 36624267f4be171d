//! A second process that does one thing, should this one be killed: it tells QEMU to listen for whoever recovers the
//! guest. It has to be done from this connection. A guest that misses pages may hold up QEMU's main thread, and then
//! nobody else is heard any more.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fastload_qmp::Qmp;

use crate::commands::{Failure, serving};

/// How long QEMU may take to notice that its connection is gone.
const NOTICE: Duration = Duration::from_secs(10);

/// One that a thread begins to make: that takes about as long as a guest's start. Without more it ends with this one.
/// The default is none.
#[derive(Debug, Default)]
pub(super) struct Coming(Option<io::Result<JoinHandle<io::Result<Child>>>>);

/// The process. It stays if this one ends, however that is.
#[derive(Debug)]
pub(super) struct Keeper(Child);

impl Coming {
    /// Nothing if this QEMU does not know commands out of band.
    pub(super) fn new(qmp: &Qmp, uri: &str) -> Coming {
        let uri = uri.to_owned();
        let make = |connection| {
            let thread = thread::Builder::new().name("stand-by".into());
            thread.spawn(move || spawn(connection, &uri))
        };
        Coming(qmp.is_out_of_band().then(|| qmp.share().and_then(make)))
    }

    /// Returns when it stands by. That there can't be one is said.
    pub(super) fn arm(self) -> Option<Keeper> {
        let made = self.0?.and_then(|thread| thread.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())));
        let armed = made.and_then(|mut process| {
            let told = process.stdin.as_mut().map_or(Ok(()), |input| input.write_all(b"\n"));
            told.map(|()| Keeper(process))
        });
        let failed = |error: &io::Error| {
            serving::note(&format!(
                "should this be killed, QEMU may not be heard again: no process can stand by: {error}"
            ));
        };
        armed.inspect_err(failed).ok()
    }
}

impl Keeper {
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
        if io::copy(&mut io::stdin().lock(), &mut io::sink())? == 0 {
            // QEMU had not been told to listen.
            return Ok(());
        }
        let socket = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(fastload_qmp::recover(socket, &self.uri, NOTICE)?)
    }
}
