//! `fastload load`: everything that is to be done to a QEMU that was started with `-incoming defer`.

mod beside;
mod check;
mod devices;
mod keeper;
mod pci;
mod qemu;
mod recover;
mod recovery;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fastload_qmp::Qmp;
use qemu_pages::serve::{Options, Phase, Report, ServeError, Server, Started};
use serde_json::json;

pub(crate) use self::beside::{Beside, Note};
use self::check::Compared;
use self::keeper::Coming;
pub(crate) use self::keeper::StandBy;
pub(crate) use self::qemu::Waiting;
use super::serving::{self, Fate, Image};
use crate::commands::Failure;
use crate::offset::Offset;
use crate::output;

/// How long QEMU may take for one QMP command.
const PATIENCE: Duration = Duration::from_secs(60);

/// The same if it need not be asked: one that is held up does not answer before it was served.
const ANSWER: Duration = Duration::from_secs(3);

/// Load a snapshot into a QEMU in milliseconds: its guest runs at once and gets its memory as it needs it.
///
/// The QEMU has been started with the same options as the one that was saved, and `-incoming defer`; any version with
/// postcopy will do. Machine type, RAM and devices are compared first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  qemu-system-x86_64 ... -incoming defer -qmp unix:/run/vm.qmp,server=on,wait=off &
  fastload load vm.snap --qmp /run/vm.qmp

If `fastload load` is killed after the guest was started, the guest waits for the pages it misses, until:
  fastload load vm.snap --qmp /run/vm.qmp --recover
That works although a guest that waits may hold up QEMU's main thread, and its monitor with it: a second process of this
program stands by meanwhile, and a note (.fastload-*.json) lies beside the QMP socket. Kill both, and it depends on
the guest: --recover says within seconds that QEMU hears nobody, and who could help.
Ctrl-C (or SIGTERM, or SIGHUP) once the guest runs sends the rest, then ends; a second one leaves at once.")]
pub(crate) struct Load {
    /// A file that QEMU saved with the capability mapped-ram.
    snapshot: PathBuf,
    #[command(flatten)]
    offset: Offset,
    /// QEMU's QMP socket, which no other program may hold meanwhile.
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    /// Leave the guest paused.
    #[arg(long, conflicts_with = "recover")]
    paused: bool,
    /// Send only what the guest asks for, until Ctrl-C (or SIGTERM, or SIGHUP).
    #[arg(long)]
    no_background: bool,
    /// Answer requests on a second connection (QEMU 8.0 and later).
    #[arg(long, conflicts_with = "recover")]
    preempt: bool,
    /// Go on after a crash: bring a started guest the pages it still misses.
    #[arg(long)]
    recover: bool,
    /// Load it even if the devices seem to differ: if they do, QEMU may end, or the guest may fail later. Machine type,
    /// processors and RAM are compared all the same.
    #[arg(long, conflicts_with = "recover")]
    skip_device_check: bool,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

impl Load {
    fn compared(&self) -> Compared {
        match (self.recover, self.skip_device_check) {
            (true, _) => Compared::Recovered,
            (false, true) => Compared::NotDevices,
            (false, false) => Compared::All,
        }
    }

    pub(crate) fn run(&self) -> Result<(), Failure> {
        let begun = Instant::now();
        let image = Image::open(&self.snapshot, &self.offset)?;
        if self.recover {
            return self.recover(begun, &image);
        }
        let mut qmp = Qmp::connect(&self.qmp, PATIENCE)?;
        let done =
            self.ready(&mut qmp, &image).and_then(|(server, waiting)| self.serve(begun, &image, server, waiting));
        if done.is_err() {
            // It may be needed by whom we leave behind.
            qmp.leave_open();
        }
        done
    }

    fn options(&self, preempt: bool) -> Options {
        let mut options = Options::default();
        options.background = !self.no_background;
        options.preempt = preempt;
        options
    }

    /// The command that goes on after a crash.
    fn recovery(&self) -> String {
        let (file, socket) = (serving::quoted(&self.snapshot), serving::quoted(&self.qmp));
        format!("fastload load {file}{} --qmp {socket} --recover", self.offset.words())
    }

    /// Makes sure that it fits, and lets QEMU listen.
    fn ready<'a>(&self, qmp: &'a mut Qmp, image: &Image) -> Result<(Server, Waiting<'a>), Failure> {
        let beside = Beside::of(&self.qmp)?;
        // While it is made there is much to ask.
        let keeper = Coming::new(qmp, &beside.uri());
        let blocks = check::fits(qmp, &image.snapshot, &self.snapshot, self.compared())?;
        let paused = self.paused || !check::ran(&image.snapshot)?;
        // What can fail here fails before QEMU is touched.
        let server = image.server(&blocks, self.options(self.preempt))?;
        serving::interrupts(server.control(), self.recovery())?;
        let waiting = Waiting::listen(qmp, &beside, &server.control(), self.preempt, paused, keeper)?;
        let note = Note::new(&self.snapshot, image, self.preempt, &blocks, waiting.before());
        if let Err(error) = beside.write(&note) {
            let beside = beside.socket.display();
            serving::note(&format!("nothing can be noted beside {beside}, should this be killed: {error}"));
        }
        Ok((server, waiting))
    }

    fn serve(&self, begun: Instant, image: &Image, server: Server, mut waiting: Waiting<'_>) -> Result<(), Failure> {
        let connecting = Instant::now();
        let (paused, mut deaf) = (waiting.paused, false);
        let mut running: Option<Instant> = None;
        let served = serving::attend(image, server, &waiting.address.clone(), self.recover, |control| {
            if self.recover {
                return Ok(false);
            }
            // If QEMU goes away the server finds out itself, and says it better.
            match waiting.qmp.wait_event(&["RESUME"], serving::MOMENT) {
                Ok(Some(event)) => running = Some(event.seen),
                Ok(None) => {}
                Err(_) => deaf = true,
            }
            if running.is_none() && paused && control.progress().phase >= Phase::Started {
                running = Some(Instant::now());
            }
            if running.is_some() && !self.json {
                let what = if paused { "loaded (paused)" } else { "running" };
                serving::note(&format!("{what} after {:.1} ms", begun.elapsed().as_secs_f64() * 1e3));
            }
            Ok(running.is_none() && !deaf)
        });
        let lost = |failure: &Failure| matches!(failure.downcast_ref(), Some(error) if ServeError::started(error) == Started::No);
        if served.as_ref().map_or_else(lost, |_| true) {
            waiting.forget();
        }
        if !self.recover && running.is_none() && served.is_ok() {
            // All was over before we looked.
            running = waiting.qmp.wait_event(&["RESUME"], Duration::ZERO).ok().flatten().map(|event| event.seen);
        }
        let restored = waiting.finish(served.is_ok());
        let report = served.map_err(|failure| {
            serving::explain(failure, &self.recovery(), || {
                // Its main thread may be held up.
                waiting.qmp.set_limit(ANSWER);
                let fate = waiting.fate();
                if fate == Fate::Ended {
                    waiting.forget();
                }
                fate
            })
        })?;
        restored?;
        self.tell(Times { begun, connecting, running }, &report, &mut waiting)
    }

    /// What came of it.
    fn tell(&self, times: Times, report: &Report, waiting: &mut Waiting<'_>) -> Result<(), Failure> {
        let Times { begun, connecting, running } = times;
        let state = waiting.qmp.run_state()?;
        let paused = state != "running";
        if paused && !waiting.paused && !self.json {
            serving::note(&format!("QEMU did not start the guest (it was started with -S, perhaps): it is {state}"));
        }
        if self.json {
            let mut figures = serving::figures(report);
            let since = |from: Instant| running.map(|at| serving::micros(at.saturating_duration_since(from)));
            figures["running_us"] = json!(since(begun).filter(|_| !paused));
            figures["loaded_us"] = json!(report.to_started.map(|to| serving::micros(connecting - begun + to)));
            figures["connect_to_running_us"] = json!(since(connecting).filter(|_| !paused));
            figures["complete_us"] = json!(serving::micros(connecting - begun + report.to_complete));
            figures["state"] = json!(if paused { "paused" } else { "running" });
            figures["preempt"] = json!(waiting.preempt);
            figures["recovered"] = json!(self.recover);
            return Ok(output::print(&format!("{figures}\n"))?);
        }
        Ok(output::print(&serving::summary(report))?)
    }
}

/// When what happened.
struct Times {
    begun: Instant,
    connecting: Instant,
    running: Option<Instant>,
}
