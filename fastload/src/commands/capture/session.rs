//! A QEMU that sends its snapshot, and what it was before.

use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fastload_qmp::{Capabilities, Event, Qmp, QmpError};
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

use super::check::Guest;
use super::hook::Hook;
use super::interrupt::Interrupts;
use super::{note, output};
use crate::commands::Failure;
use crate::commands::load::{Coming, Keeper};
use crate::commands::serving::MOMENT;

/// How often QEMU is asked whether it can write-protect its memory, if it says no.
const ATTEMPTS: usize = 100;
/// How long QEMU may take to end a migration that was cancelled.
const ENDING: Duration = Duration::from_secs(60);
/// How long QEMU may take to say that it has stopped the guest, after it has answered.
const STOPPING: Duration = Duration::from_secs(10);
/// How much QEMU may send before we have written it, in bytes of the system's memory.
const SLACK: usize = 64 << 20;
/// What QEMU knows our descriptor by, until it takes it.
const NAME: &str = "fastload-capture";

/// What turns background-snapshot off, through QMP.
const TURN_OFF: &str = r#"{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "background-snapshot", "state": false}]}}"#;

/// How far QEMU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It was not told to send yet.
    Ready,
    /// It is at work.
    Active,
    /// It says that all was sent.
    Completed,
    /// It gave up: why, in its own words.
    Failed(String),
}

/// The freeze point.
#[derive(Clone, Copy, Debug)]
pub(super) struct Freeze {
    /// When the guest stopped: the time since 1970, by QEMU's clock.
    pub(super) at: Duration,
    /// For how long it stood still.
    pub(super) blackout: Duration,
    /// Whether it was for a command.
    pub(super) held: bool,
}

/// The migration that sends the snapshot.
#[derive(Debug)]
pub(super) struct Session<'a> {
    qmp: &'a mut Qmp,
    before: Capabilities,
    was_running: bool,
    /// Our end of the socket, to hang up.
    socket: UnixStream,
    stage: Stage,
    stopped: Option<Event>,
    resumed: Option<Event>,
    /// Whether it was we who stopped the guest, for a command.
    held: bool,
    hooked: bool,
    /// Sees to it that the guest goes on if this process is killed while it is held.
    keeper: Option<Keeper>,
    /// How a command line names QEMU's monitor.
    address: String,
}

impl<'a> Session<'a> {
    /// Prepares QEMU to send a snapshot into a socket that has no name.
    pub(super) fn begin(
        qmp: &'a mut Qmp,
        guest: &Guest,
        interrupts: &Interrupts,
        address: &str,
    ) -> Result<Session<'a>, Failure> {
        let (socket, theirs) = UnixStream::pair()?;
        // What waits there for the disk keeps no writer of the guest waiting. Without privileges the system allows less.
        if setsockopt(&theirs, sockopt::SndBufForce, &SLACK).is_err() {
            let _ = setsockopt(&theirs, sockopt::SndBuf, &SLACK);
        }
        // Its events tell how the migration goes.
        let wanted = ["background-snapshot", "events"].map(|name| (name.to_owned(), true));
        let wanted = Capabilities(wanted.into_iter().collect());
        let mut found = guest.capabilities.clone();
        let left_on = left_on(qmp, guest);
        if left_on {
            found.0.insert("background-snapshot".to_owned(), false);
        }
        let before = found.0.iter().filter(|(name, _)| wanted.0.contains_key(*name));
        let before = Capabilities(before.map(|(name, state)| (name.clone(), *state)).collect());
        // Before anything else: if we are killed it tells the next capture of this QEMU that it was we who changed it.
        qmp.pass_fd(NAME, theirs.as_fd())?;
        drop(theirs);
        if let Err(failure) = turn_on(qmp, &found, &wanted, interrupts) {
            // It goes on to tell what was left on.
            if !left_on {
                take_back(qmp);
            }
            return Err(failure);
        }
        qmp.forget_events();
        Ok(Session {
            qmp,
            before,
            was_running: guest.running,
            socket,
            stage: Stage::Ready,
            stopped: None,
            resumed: None,
            held: false,
            hooked: false,
            keeper: None,
            address: address.to_owned(),
        })
    }

    /// Stops the guest and runs a command. How long that took. [`go`](Session::go) lets the guest go on.
    pub(super) fn hold(&mut self, hook: &Hook, interrupts: &Interrupts, json: bool) -> Result<Duration, Failure> {
        if self.was_running {
            self.keeper = Coming::resuming(self.qmp).arm();
            (self.held, self.hooked) = (true, true);
            self.qmp.execute("stop", json!({}))?;
            self.stopped = self.qmp.wait_event(&["STOP"], STOPPING)?;
            let at = self.stopped.as_ref().ok_or("QEMU does not say that it has stopped the guest")?.happened;
            output::held(at, json)?;
        }
        hook.run(interrupts)
    }

    /// Lets QEMU send.
    pub(super) fn send(&mut self) -> Result<(), Failure> {
        let sent = self.migrate().map_err(userfaultfd);
        if sent.is_ok() {
            self.stage = Stage::Active;
        }
        sent
    }

    /// The monitor, for other questions.
    pub(super) fn qmp(&mut self) -> &mut Qmp {
        self.qmp
    }

    /// Whether the guest still stands still for a command.
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// Lets a guest go on that was held, now that QEMU protects its memory.
    pub(super) fn go(&mut self) -> Result<(), Failure> {
        // What QEMU has to do to its run state after it has saved the guest, it has done when it answers the second of
        // two commands.
        self.qmp.run_state()?;
        if self.qmp.run_state()? == "paused" && self.resumed.is_none() {
            let started = self.qmp.execute("cont", json!({}));
            started.map_err(|error| format!("{error}. To start the guest: fastload resume --qmp {}", self.address))?;
        }
        self.held = false;
        self.keeper.take().into_iter().for_each(Keeper::dismiss);
        Ok(())
    }

    fn migrate(&mut self) -> Result<(), QmpError> {
        let started = self.qmp.execute("migrate", json!({"uri": format!("fd:{NAME}")}));
        if started.is_err() {
            // It is still there if QEMU refused early.
            take_back(self.qmp);
        }
        started.map(drop)
    }

    /// Our end of the socket.
    pub(super) fn socket(&self) -> std::io::Result<UnixStream> {
        self.socket.try_clone()
    }

    /// Nobody reads any more: a QEMU that waits for that gives up, and so does our own reader.
    pub(super) fn hang_up(&self) {
        // Fails only if QEMU has hung up.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Waits for a moment for news. The freeze point, if this is it.
    pub(super) fn look(&mut self) -> Result<Option<Freeze>, QmpError> {
        let Some(event) = self.qmp.wait_event(&["MIGRATION", "STOP", "RESUME"], MOMENT)? else { return Ok(None) };
        self.see(event)
    }

    /// What has come and was not looked at. The freeze point, if it was there.
    pub(super) fn rest(&mut self) -> Result<Option<Freeze>, QmpError> {
        let mut freeze = None;
        while let Some(event) = self.qmp.wait_event(&["STOP", "RESUME"], Duration::ZERO)? {
            freeze = self.see(event)?.or(freeze);
        }
        Ok(freeze)
    }

    fn see(&mut self, event: Event) -> Result<Option<Freeze>, QmpError> {
        match event.name.as_str() {
            "STOP" if self.stopped.is_none() => self.stopped = Some(event),
            "RESUME" if self.resumed.is_none() => {
                let Some(stopped) = &self.stopped else { return Ok(None) };
                let blackout = event.happened.saturating_sub(stopped.happened);
                let freeze = Freeze { at: stopped.happened, blackout, held: self.hooked };
                self.resumed = Some(event);
                return Ok(Some(freeze));
            }
            "MIGRATION" => self.moved(event.data["status"].as_str().unwrap_or_default())?,
            _ => {}
        }
        Ok(None)
    }

    fn moved(&mut self, status: &str) -> Result<(), QmpError> {
        match status {
            "completed" => self.stage = Stage::Completed,
            "failed" | "cancelled" => {
                let (_, why) = self.qmp.migration()?;
                self.stage = Stage::Failed(why.unwrap_or_else(|| format!("the migration was {status}")));
            }
            _ => {}
        }
        Ok(())
    }

    pub(super) fn stage(&self) -> &Stage {
        &self.stage
    }

    /// Asks how far it is, for when its events are not enough.
    pub(super) fn ask(&mut self) -> Result<&Stage, QmpError> {
        if self.stage == Stage::Active {
            let (status, _) = self.qmp.migration()?;
            self.moved(&status)?;
        }
        Ok(&self.stage)
    }

    /// Puts everything back: the migration ends, the guest goes on if it did before, and the settings are as they were.
    pub(super) fn finish(mut self, complete: bool, interrupts: &Interrupts) -> Result<(), Failure> {
        let put_back = if complete { Ok(true) } else { self.give_up(interrupts) };
        match put_back.and_then(|ended| if ended { self.restore().map(|()| true) } else { Ok(false) }) {
            // A QEMU that has gone needs nothing any more.
            Ok(true) | Err(QmpError::Closed) => Ok(()),
            Ok(false) => Err("QEMU does not end its migration, so its capabilities could not be restored".into()),
            Err(error) => Err(format!("QEMU could not be put back as it was: {error}").into()),
        }
    }

    /// Ends the migration; whether it did.
    fn give_up(&mut self, interrupts: &Interrupts) -> Result<bool, QmpError> {
        self.hang_up();
        if self.stage == Stage::Ready {
            take_back(self.qmp);
            return self.go_on().map(|()| true);
        }
        let until = Instant::now() + ENDING;
        if *self.ask()? == Stage::Active {
            self.qmp.execute("migrate_cancel", json!({}))?;
        }
        while *self.ask()? == Stage::Active {
            if interrupts.came() || Instant::now() > until {
                return Ok(false);
            }
            self.look()?;
        }
        self.go_on().map(|()| true)
    }

    /// A QEMU that fails between stopping the guest and sending its memory leaves it stopped.
    fn go_on(&mut self) -> Result<(), QmpError> {
        let paused = self.was_running && self.qmp.run_state()? == "paused";
        self.rest()?;
        // One that has run since was stopped by somebody else.
        if paused && (self.stopped.is_some() || self.held) && self.resumed.is_none() {
            self.qmp.execute("cont", json!({}))?;
        }
        self.keeper.take().into_iter().for_each(Keeper::dismiss);
        Ok(())
    }

    fn restore(&mut self) -> Result<(), QmpError> {
        self.qmp.set_capabilities(&Capabilities::default(), &self.before)
    }
}

/// QEMU forgets the socket that it was given and has not used. Whether there was one.
fn take_back(qmp: &mut Qmp) -> bool {
    qmp.execute("closefd", json!({"fdname": NAME})).is_ok()
}

/// Whether background-snapshot is on, and nobody wants it so: a capture that was killed before QEMU sent anything leaves
/// the socket with it, and one that was killed later hangs up, and its migration fails.
fn left_on(qmp: &mut Qmp, guest: &Guest) -> bool {
    if guest.capabilities.0.get("background-snapshot") != Some(&true) {
        return false;
    }
    let killed = take_back(qmp) || guest.failed;
    note(&if killed {
        "QEMU's capability background-snapshot is on, as a capture that was killed leaves it; it will be turned off"
            .into()
    } else {
        format!("QEMU's capability background-snapshot is on already, and stays on; to turn it off: {TURN_OFF}")
    });
    killed
}

/// Turns capabilities on. QEMU tries background-snapshot out on its memory then, and now and then finds for no reason that
/// it does not work (seen with 10.0.2), so it is asked again: a refusal changes nothing.
fn turn_on(
    qmp: &mut Qmp,
    before: &Capabilities,
    wanted: &Capabilities,
    interrupts: &Interrupts,
) -> Result<(), Failure> {
    for _ in 1..ATTEMPTS {
        match qmp.set_capabilities(before, wanted) {
            Err(error) if may_be_wrong(&error) => {}
            done => return done.map_err(userfaultfd),
        }
        if interrupts.came() {
            return Err("cancelled: the guest goes on, and nothing was written".into());
        }
        // A moment later its memory is in another state.
        std::thread::sleep(MOMENT);
    }
    qmp.set_capabilities(before, wanted).map_err(userfaultfd)
}

/// Whether this is the refusal that QEMU may not repeat (QEMU migration/options.c, `migrate_caps_check`).
fn may_be_wrong(error: &QmpError) -> bool {
    let QmpError::Refused { command, description, .. } = error else { return false };
    let text = description.to_lowercase();
    command == "migrate-set-capabilities"
        && text.contains("background-snapshot is not compatible with guest memory configuration")
}

/// Says what to do if QEMU has no right to userfaultfd.
fn userfaultfd(error: QmpError) -> Failure {
    let text = error.to_string();
    if text.to_lowercase().contains("background-snapshot is not supported") {
        return format!(
            "{text}. If QEMU lacks the right to userfaultfd, give it one of: read and write access to /dev/userfaultfd \
             (setfacl -m u:USER:rw /dev/userfaultfd), CAP_SYS_PTRACE, or sysctl vm.unprivileged_userfaultfd=1"
        )
        .into();
    }
    error.into()
}
