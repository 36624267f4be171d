//! A second process that does one thing, should this one be killed: it tells QEMU to listen for the process that recovers the
//! guest, or lets a guest go on that was stopped for a moment. It has to be done from this connection. A guest that misses pages may hold up QEMU's main thread, and then
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

/// What it is told instead of an address where the guest is only to go on.
const RESUME: &str = "resume";

/// One that a thread begins to make: that takes about as long as a guest's start. Without more it ends with this one.
/// The default is none.
#[derive(Debug, Default)]
pub(crate) struct Coming(Option<io::Result<JoinHandle<io::Result<Child>>>>);

/// The process. It stays if this one ends, however that is.
#[derive(Debug)]
pub(crate) struct Keeper(Child);

impl Coming {
    /// Nothing if this QEMU does not know commands out of band.
    pub(super) fn new(qmp: &Qmp, uri: &str) -> Coming {
        Coming(qmp.is_out_of_band().then(|| make(qmp, uri)))
    }

    /// One that lets a stopped guest go on.
    pub(crate) fn resuming(qmp: &Qmp) -> Coming {
        Coming(Some(make(qmp, RESUME)))
    }

    /// Returns when it stands by. That there can't be one is said.
    pub(crate) fn arm(self) -> Option<Keeper> {
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
    pub(crate) fn dismiss(mut self) {
        // Fails only if it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn make(qmp: &Qmp, task: &str) -> io::Result<JoinHandle<io::Result<Child>>> {
    let (connection, task) = (qmp.share()?, task.to_owned());
    thread::Builder::new().name("stand-by".into()).spawn(move || spawn(connection, &task))
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
    /// Where QEMU is to listen then; or that its guest is to go on.
    task: String,
}

impl StandBy {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        // A service manager that ends all processes of a service asks the other one as well, which may need a while.
        ctrlc::set_handler(|| {})?;
        if io::copy(&mut io::stdin().lock(), &mut io::sink())? == 0 {
            // QEMU had not been told to listen.
            return Ok(());
        }
        let socket = UnixStream::from(io::stdout().as_fd().try_clone_to_owned()?);
        if self.task == RESUME {
            return Ok(fastload_qmp::resume(socket, NOTICE)?);
        }
        Ok(fastload_qmp::recover(socket, &self.task, NOTICE)?)
    }
}
