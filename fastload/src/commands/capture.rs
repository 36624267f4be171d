//! `fastload capture`: a snapshot of a QEMU whose guest goes on running.

mod check;
mod hook;
mod interrupt;
mod output;
mod promise;
mod run_state;
mod session;
mod take;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fastload_qmp::QmpAddress;

use self::hook::Hook;
use self::interrupt::Interrupts;
use self::promise::Allow;
use self::session::Session;
use crate::commands::{Failure, monitor, serving};
use crate::parse;

/// Save a running QEMU while its guest goes on: it stands still for some milliseconds only.
///
/// The QEMU needs no preparation, and stays as it is. The file shows the guest at one instant, the freeze point, which
/// is told when it happens. It is a mapped-ram snapshot: QEMU's own `-incoming file:` loads it (with the capability
/// mapped-ram), and so do `fastload load` and `fastload serve`.
///
/// Disks are not part of it: the guest goes on writing to its images, and a file needs the images of the same instant.
/// --exec-frozen runs a command that copies them, or makes snapshots of them, while the guest stands still.
///
/// The file appears under its name when it is complete and safe on the disk, replacing what was there, or not at all. A
/// capture that fails or is cancelled (Ctrl-C, SIGTERM, SIGHUP) leaves the guest running.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  qemu-system-x86_64 ... -qmp unix:/run/vm.qmp,server=on,wait=off &
  fastload capture --qmp /run/vm.qmp vm.snap
  fastload capture --qmp /run/vm.qmp vm.snap --exec-frozen 'cp --reflink=auto vm.qcow2 vm-copy.qcow2'

The command of --exec-frozen is run by sh. It finds FASTLOAD_QMP (the QMP socket, which it can't use), FASTLOAD_OUT (the \
file to come) and FASTLOAD_DISKS (the images that the guest writes to, one a line). The guest stands still until it has \
ended; if it fails, or takes too long, nothing is captured and the guest goes on.")]
pub(crate) struct Capture {
    /// QEMU's QMP socket: a path, or unix:PATH. No other program may hold it meanwhile.
    #[arg(long, value_name = "ADDRESS", value_parser = parse::qmp())]
    qmp: QmpAddress,
    /// The file to write.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Begin even if the disk has no space for all of RAM: zero pages take none. A disk that is full fails the capture.
    #[arg(long)]
    any_space: bool,
    /// Run a command at the freeze point, while the guest stands still: to copy its disk images, for example.
    #[arg(long, value_name = "COMMAND")]
    exec_frozen: Option<OsString>,
    /// How long that command may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "exec_frozen", value_parser = clap::value_parser!(u64).range(1..=86400))]
    exec_limit: u64,
    /// Capture although the file may not show one instant, or the host's memory may not suffice.
    #[arg(long, value_name = "WHAT")]
    allow: Vec<Allow>,
    #[command(flatten)]
    patience: monitor::Patience,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Capture {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        // Before any thread: those that come inherit it.
        let interrupts = Interrupts::catch()?;
        let begun = Instant::now();
        check::writable(&self.output)?;
        let mut qmp = monitor::connect(&self.qmp, self.patience)?;
        if !qmp.passes_fds() {
            return Err(format!(
                "{}: QEMU is given a socket for the snapshot, which takes a QMP unix socket: -qmp unix:PATH,server=on,wait=off",
                self.qmp
            )
            .into());
        }
        let guest = check::ready(&mut qmp)?;
        if !self.any_space {
            check::space(&self.output, guest.ram)?;
        }
        let warnings = promise::check(&mut qmp, guest.running, &self.allow)?;
        warnings.iter().for_each(|warning| note(warning));
        let hook = self.hook(&guest)?;
        let mut session = Session::begin(&mut qmp, &guest, &interrupts, &serving::address(&self.qmp))?;
        let held = hook.as_ref().map_or(Ok(None), |hook| session.hold(hook, &interrupts, self.json).map(Some));
        let sent = held.and_then(|held| session.send().map(|()| held));
        let taken = sent.and_then(|held| {
            let taken = take::take(&mut session, &guest, &self.output, &interrupts, self.json)?;
            promise::check_again(session.qmp(), guest.running, &self.allow)?;
            Ok(if held.is_some() && guest.running { taken.that_was_running() } else { taken })
        });
        // Whatever happened, QEMU gets its settings back, and the guest goes on.
        let restored = session.finish(taken.is_ok(), &interrupts);
        let taken = match (taken, &restored) {
            (Ok(taken), _) => taken,
            (Err(failure), Ok(())) => return Err(failure),
            (Err(failure), Err(more)) => return Err(format!("{failure}; besides, {more}").into()),
        };
        let mut captured = taken.publish(begun)?;
        (captured.disks, captured.warnings) = (guest.disks, warnings);
        captured.print(self.json)?;
        restored.map_err(|error| format!("{} is complete, but {error}", self.output.display()).into())
    }
}

impl Capture {
    /// The command that is run at the freeze point.
    fn hook(&self, guest: &check::Guest) -> Result<Option<Hook>, Failure> {
        let Some(command) = &self.exec_frozen else { return Ok(None) };
        let out = std::path::absolute(&self.output).map_err(|error| format!("{}: {error}", self.output.display()))?;
        let qmp = self.qmp.path().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
        let variables = vec![
            ("FASTLOAD_QMP", qmp.unwrap_or_default().into()),
            ("FASTLOAD_OUT", out.into()),
            ("FASTLOAD_DISKS", guest.disks.join("\n").into()),
        ];
        Ok(Some(Hook { command: command.clone(), limit: Duration::from_secs(self.exec_limit), variables }))
    }
}

/// Says something that people want to know in addition to the result.
fn note(text: &str) {
    serving::note(text);
}
