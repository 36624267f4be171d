//! A second process that does one thing, should this one be killed: it tells QEMU to listen for whoever recovers the
//! guest. It has to be done from this connection. A guest that misses pages may hold up QEMU's main thread, and then
//! nobody else is heard any more.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fastload_qmp::Qmp;

use crate::commands::{Failure, serving};

/// How long QEMU may take to notice that its connection is gone.
const NOTICE: Duration = Duration::from_secs(10);

/// The process. It stays if this one ends, however that is.
#[derive(Debug)]
pub(super) struct Keeper(Child);

impl Keeper {
    /// Starts it; nothing if this QEMU does not know commands out of band.
    fn start(qmp: &Qmp, uri: &str) -> io::Result<Option<Keeper>> {
        if !qmp.is_out_of_band() {
            return Ok(None);
        }
        // This very program, even if there is another one under its name by now.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("fastload").arg("stand-by").arg(uri);
        // Its input ends with us. Ctrl-C is not for it.
        command.stdin(Stdio::piped()).stdout(qmp.share()?).stderr(Stdio::null()).process_group(0);
        Ok(Some(Keeper(command.spawn()?)))
    }

    /// It is not needed: the guest has everything, or is gone.
    pub(super) fn dismiss(mut self) {
        // Fails only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts one, and goes on without if there can't be one.
pub(super) fn start(qmp: &Qmp, uri: &str) -> Option<Keeper> {
    let started = Keeper::start(qmp, uri);
    started.unwrap_or_else(|error| {
        serving::note(&format!(
            "should this be killed, QEMU may not be heard again: a process can't be started: {error}"
        ));
        None
    })
}

/// Wait for the end of the process that began this one. Not for people.
#[derive(Debug, clap::Args)]
pub(crate) struct StandBy {
    /// Where QEMU is to listen then.
    uri: String,
}

impl StandBy {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        io::copy(&mut io::stdin().lock(), &mut io::sink())?;
        let socket = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(fastload_qmp::recover(socket, &self.uri, NOTICE)?)
    }
}
