//! `fastload capture`: a snapshot of a QEMU whose guest goes on running.

mod check;
mod interrupt;
mod output;
mod session;
mod take;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fastload_qmp::Qmp;

use self::interrupt::Interrupts;
use self::session::Session;
use crate::commands::{Failure, serving};

/// How long QEMU may take for one QMP command.
const PATIENCE: Duration = Duration::from_secs(60);

/// Save a running QEMU while its guest goes on: it stands still for some milliseconds only.
///
/// The QEMU needs no preparation, and stays as it is. The file shows the guest at one instant, the freeze point, which
/// is told when it happens. It is a mapped-ram snapshot: QEMU's own `-incoming file:` loads it (with the capability
/// mapped-ram), and so do `fastload load` and `fastload serve`. Disks are not part of it.
///
/// The file appears under its name when it is complete and safe on the disk, replacing what was there, or not at all. A
/// capture that fails or is cancelled (Ctrl-C, SIGTERM, SIGHUP) leaves the guest running.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  qemu-system-x86_64 ... -qmp unix:/run/vm.qmp,server=on,wait=off &
  fastload capture --qmp /run/vm.qmp vm.snap

If it is killed (SIGKILL) the guest goes on as well, but QEMU's capability background-snapshot
stays on until the next capture of it through the same QMP socket; the capability events, which
does no harm, stays on.

With --json there are two lines: {\"event\": \"frozen\", ...} right after the freeze point, with the
blackout in microseconds (not if the guest was paused), and {\"event\": \"captured\", ...} when the
file is there.")]
pub(crate) struct Capture {
    /// QEMU's QMP socket, which no other program may hold meanwhile.
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// The file to write.
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// Begin even if the disk has no room for all of RAM: zero pages take none. A disk that is full fails the capture.
    #[arg(long)]
    any_space: bool,
    /// Print JSON, and no progress bar.
    #[arg(long)]
    json: bool,
}

impl Capture {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        // Before any thread: those that come inherit it.
        let interrupts = Interrupts::catch()?;
        let begun = Instant::now();
        check::writable(&self.output)?;
        let mut qmp = Qmp::connect(&self.qmp, PATIENCE)?;
        let guest = check::ready(&mut qmp)?;
        if !self.any_space {
            check::space(&self.output, guest.ram)?;
        }
        let mut session = Session::begin(&mut qmp, &guest, &interrupts)?;
        let taken = take::take(&mut session, &guest, &self.output, &interrupts, self.json);
        // Whatever happened, QEMU gets its settings back, and the guest goes on.
        let restored = session.finish(taken.is_ok(), &interrupts);
        let taken = match (taken, &restored) {
            (Ok(taken), _) => taken,
            (Err(failure), Ok(())) => return Err(failure),
            (Err(failure), Err(more)) => return Err(format!("{failure}; besides, {more}").into()),
        };
        let captured = taken.publish(begun)?;
        captured.print(self.json)?;
        restored.map_err(|error| format!("{} is complete, but {error}", self.output.display()).into())
    }
}

/// Something that people want to know, beside the result.
fn note(text: &str) {
    serving::note(text);
}
