//! `fastload load`: everything that is to be done to a QEMU that was started with `-incoming defer`.

mod beside;
mod check;
mod devices;
mod keeper;
mod pci;
mod qemu;
mod recover;
mod recovery;
pub(crate) mod state;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use fastload_qmp::{Qmp, QmpAddress, QmpError};
use qemu_pages::serve::{Options, Report, ServeError, Server, Started};
use serde_json::json;

pub(crate) use self::beside::{Beside, Note};
use self::check::Compared;
pub(crate) use self::keeper::{Coming, Keeper, StandBy};
pub(crate) use self::qemu::Waiting;
use self::state::{Paused, Start};
use super::monitor::Patience;
use super::serving::{self, Fate, Image};
use super::{disks, monitor};
use crate::commands::Failure;
use crate::event::Event;
use crate::offset::Offset;
use crate::{output, parse};

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

Exit code 0 means that the guest runs, or is paused as asked: with --paused, with QEMU's -S, or if it was paused when it \
was saved. A paused guest is started by `fastload resume`. Its disks must be free when it is started, since QEMU locks them.

If `fastload load` is killed after the guest was started, the guest waits for the pages it misses, until:
  fastload load vm.snap --qmp /run/vm.qmp --recover

Ctrl-C (or SIGTERM, or SIGHUP) once the guest runs sends the rest, then ends; a second one leaves at once.")]
pub(crate) struct Load {
    /// A file that QEMU saved with the capability mapped-ram.
    snapshot: PathBuf,
    #[command(flatten)]
    offset: Offset,
    /// QEMU's QMP socket: a path, unix:PATH, or tcp:HOST:PORT. No other program may hold it meanwhile.
    #[arg(long, value_name = "ADDRESS", value_parser = parse::qmp())]
    qmp: QmpAddress,
    /// Leave the guest paused.
    #[arg(long, conflicts_with = "recover")]
    paused: bool,
    /// Start the guest also if it was paused when it was saved, or QEMU was started with -S.
    #[arg(long, conflicts_with = "paused")]
    run: bool,
    /// Send only what the guest asks for, until Ctrl-C (or SIGTERM, or SIGHUP).
    #[arg(long)]
    no_background: bool,
    /// Answer requests on a second connection (QEMU 8.0 and later). With --recover it is as it was.
    #[arg(long)]
    preempt: bool,
    /// Go on after a crash: bring a started guest the pages it still misses.
    #[arg(long)]
    recover: bool,
    /// Load it even if the devices seem to differ: if they do, QEMU may end, or the guest may fail later. Machine type,
    /// processors and RAM are compared all the same.
    #[arg(long, conflicts_with = "recover")]
    skip_device_check: bool,
    /// Load it even if another process seems to hold a disk image: if it does, QEMU can't start the guest, and has to be
    /// ended.
    #[arg(long, conflicts_with = "recover")]
    skip_disk_check: bool,
    /// Compare everything with the QEMU, and load nothing.
    #[arg(long, conflicts_with_all = ["recover", "paused", "run"])]
    check_only: bool,
    #[command(flatten)]
    patience: Patience,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
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
        let mut qmp = self.connect()?;
        if self.check_only {
            return self.only_check(&mut qmp, &image);
        }
        let done =
            self.ready(&mut qmp, &image).and_then(|(server, waiting)| self.serve(begun, &image, server, waiting));
        if done.is_err() {
            // It may be needed by whom we leave behind.
            qmp.leave_open();
        }
        done
    }

    /// Connects to a QEMU that is to wait for a snapshot. One that does not answer may have got one already.
    fn connect(&self) -> Result<Qmp, Failure> {
        let note = Beside::of(&self.qmp).ok().and_then(|beside| beside.read());
        let Some(note) = note else { return Ok(monitor::connect(&self.qmp, self.patience)?) };
        match Qmp::connect(&self.qmp, ANSWER) {
            Err(error @ QmpError::Mute { .. }) => Err(format!(
                "{error}. Its guest is one that was being loaded, and it waits for the rest of its memory: {}",
                note.recovery(&self.recovery())
            )
            .into()),
            // Somebody has it, for a moment perhaps.
            Err(QmpError::NoGreeting { .. }) => Ok(monitor::connect(&self.qmp, self.patience)?),
            connected => {
                let mut qmp = connected?;
                qmp.set_limit(self.patience.get());
                Ok(qmp)
            }
        }
    }

    /// All that is compared before anything is done to QEMU.
    fn only_check(&self, qmp: &mut Qmp, image: &Image) -> Result<(), Failure> {
        let snapshot = format!("{}{}", serving::quoted(&self.snapshot), self.offset.words());
        qemu::waits(qmp, Beside::of(&self.qmp)?.read().as_ref(), &self.recovery(), &snapshot)?;
        let blocks = check::fits(qmp, &image.snapshot, &self.snapshot, self.compared())?;
        if self.preempt {
            qemu::knows_preempt(qmp)?;
        }
        let state = check::saved_state(&image.snapshot)?;
        self.disks_are_free(qmp, self.paused || (state != "running" && !self.run))?;
        image.server(&blocks, self.options(self.preempt))?;
        if self.json {
            return Ok(Event::new("complete").path("file", &self.snapshot).with(json!({ "fits": true })).print()?);
        }
        Ok(output::print(&format!("{}: it fits this QEMU\n", self.snapshot.display()))?)
    }

    fn options(&self, preempt: bool) -> Options {
        let mut options = Options::default();
        options.background = !self.no_background;
        options.preempt = preempt;
        options
    }

    /// The command that goes on after a crash.
    fn recovery(&self) -> String {
        let (file, socket) = (serving::quoted(&self.snapshot), serving::address(&self.qmp));
        format!("fastload load {file}{} --qmp {socket} --recover", self.offset.words())
    }

    /// Makes sure that it fits, and lets QEMU listen.
    fn ready<'a>(&self, qmp: &'a mut Qmp, image: &Image) -> Result<(Server, Waiting<'a>), Failure> {
        let beside = Beside::of(&self.qmp)?;
        let snapshot = format!("{}{}", serving::quoted(&self.snapshot), self.offset.words());
        qemu::waits(qmp, beside.read().as_ref(), &self.recovery(), &snapshot)?;
        let beside = beside.reached_by(qmp)?;
        // While it is made there is much to ask.
        let keeper = Coming::new(qmp, &beside.uri());
        let blocks = check::fits(qmp, &image.snapshot, &self.snapshot, self.compared())?;
        if self.preempt {
            qemu::knows_preempt(qmp)?;
        }
        let paused = match check::saved_state(&image.snapshot)? {
            _ if self.paused => Some(Paused::Asked),
            state if state == "running" || self.run => None,
            state => Some(Paused::Saved(state)),
        };
        self.disks_are_free(qmp, paused.is_some())?;
        // What can fail here fails before QEMU is touched.
        let server = image.server(&blocks, self.options(self.preempt))?;
        serving::interrupts(server.control(), self.recovery())?;
        let waiting = Waiting::listen(qmp, &beside, &server.control(), self.preempt, paused, keeper)?;
        let note =
            Note::new(&self.snapshot, image, self.preempt, &blocks, waiting.before()).with_recovery(&self.recovery());
        if let Err(error) = beside.write(&note) {
            let beside = beside.socket.display();
            serving::note(&format!("no note can be left next to {beside}, should this be killed: {error}"));
        }
        Ok((server, waiting))
    }

    /// QEMU could not start the guest if another process held one of its disks, and could not do so later either.
    fn disks_are_free(&self, qmp: &mut Qmp, paused: bool) -> Result<(), Failure> {
        let Some(held) = disks::held(qmp)?.filter(|_| !self.skip_disk_check) else { return Ok(()) };
        let resume = format!("fastload resume --qmp {}", serving::address(&self.qmp));
        if paused {
            serving::note(&format!("the guest can't be started yet: {held}"));
            return Ok(());
        }
        Err(format!(
            "QEMU could not start the guest: {held}. End that first; or load with --paused, and when the image is free: \
             {resume} (--skip-disk-check leaves this check out)"
        )
        .into())
    }

    fn serve(&self, begun: Instant, image: &Image, server: Server, mut waiting: Waiting<'_>) -> Result<(), Failure> {
        let connecting = Instant::now();
        let mut start = Start::new(self.run);
        let address = serving::address(&self.qmp);
        let served = serving::attend(image, server, &waiting.address.clone(), self.recover, self.json, |control| {
            if self.recover {
                return Ok(false);
            }
            let more =
                start.look(waiting.qmp, control, waiting.paused.is_some(), (ANSWER, self.patience.get()), &address)?;
            if self.json && (start.running.is_some() || start.paused) {
                Event::new(if start.paused { "loaded" } else { "running" }).print()?;
            } else if start.running.is_some() {
                serving::note(&format!("running after {:.1} ms", begun.elapsed().as_secs_f64() * 1e3));
            } else if start.paused {
                let why = waiting.paused.as_ref().map_or_else(|| state::STARTED_WITH_S.to_owned(), Paused::to_string);
                let after = begun.elapsed().as_secs_f64() * 1e3;
                serving::note(&format!("loaded (paused) after {after:.1} ms: {why}"));
            }
            Ok(more)
        });
        let never = |failure: &Failure| {
            failure.is::<state::Lost>()
                || matches!(failure.downcast_ref(), Some(error) if ServeError::started(error) == Started::No)
        };
        if served.as_ref().map_or_else(never, |_| true) {
            waiting.forget();
        }
        if served.as_ref().is_err_and(never) {
            // One that lives on, and does not take them back, is of no use in any case.
            waiting.qmp.set_limit(ANSWER);
            waiting.put_back().unwrap_or_default();
        }
        if !self.recover && start.running.is_none() && served.is_ok() {
            // All was over before we looked.
            let resumed = waiting.qmp.wait_event(&["RESUME"], Duration::ZERO);
            start.running = resumed.ok().flatten().map(|event| event.seen);
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
        self.tell(Times { begun, connecting, running: start.running }, &report, &mut waiting)
    }

    /// What came of it.
    fn tell(&self, times: Times, report: &Report, waiting: &mut Waiting<'_>) -> Result<(), Failure> {
        let Times { begun, connecting, running } = times;
        let address = serving::address(&self.qmp);
        let state::Settled { state, why } = state::settled(waiting, self.run, self.recover, &address)?;
        let paused = state != "running";
        if self.json {
            let mut figures = serving::figures(report);
            let since = |from: Instant| running.map(|at| serving::micros(at.saturating_duration_since(from)));
            figures["running_us"] = json!(since(begun).filter(|_| !paused));
            figures["loaded_us"] = json!(report.to_started.map(|to| serving::micros(connecting - begun + to)));
            figures["connect_to_running_us"] = json!(since(connecting).filter(|_| !paused));
            figures["complete_us"] = json!(serving::micros(connecting - begun + report.to_complete));
            figures["state"] = json!(state);
            figures["paused_because"] = json!(why.as_ref().map(|(name, _)| name));
            figures["preempt"] = json!(waiting.preempt);
            figures["recovered"] = json!(self.recover);
            return Ok(Event::new("complete").with(figures).print()?);
        }
        if let Some((_, text)) = why {
            serving::note(&format!("the guest is paused: {text}. To start it: fastload resume --qmp {address}"));
        }
        Ok(output::print(&serving::summary(report, connecting - begun + report.to_complete))?)
    }
}

/// When what happened.
struct Times {
    begun: Instant,
    connecting: Instant,
    running: Option<Instant>,
}
