//! Whether the guest runs, and if not, why, and what to do.

use std::fmt;
use std::time::{Duration, Instant};

use fastload_qmp::{Qmp, QmpError};
use qemu_pages::serve::{Control, Phase};
use serde_json::json;

use super::Waiting;
use crate::commands::Failure;
use crate::commands::serving::MOMENT;
use crate::commands::{disks, resume};

/// How long QEMU may take to start the guest, once its devices are loaded and it answers.
const GRACE: Duration = Duration::from_secs(2);

/// How often QEMU is asked whether the guest runs, as long as it does not say so itself.
const AGAIN: Duration = Duration::from_millis(200);

/// Why a guest is to be left paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Paused {
    /// By `--paused`.
    Asked,
    /// It was not running when it was saved, but in this state.
    Saved(String),
}

impl Paused {
    /// For programs.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Paused::Asked => "asked",
            Paused::Saved(_) => "saved-paused",
        }
    }
}

impl fmt::Display for Paused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Paused::Asked => write!(f, "as --paused asks"),
            Paused::Saved(state) => write!(f, "as it was when it was saved ({state}; --run starts it all the same)"),
        }
    }
}

/// What is said of a guest that was left paused by QEMU itself.
pub(super) const STARTED_WITH_S: &str = "QEMU was started with -S (or another client has paused it)";

/// The guest will not run, and its QEMU is of no use any more.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Lost(pub(super) String);

/// Watches QEMU start the guest.
#[derive(Debug, Default)]
pub(super) struct Start {
    /// The guest is to run even if QEMU would leave it paused.
    run: bool,
    pub(super) running: Option<Instant>,
    /// It stands still, loaded.
    pub(super) paused: bool,
    loaded: Option<Instant>,
    asked: Option<Instant>,
}

impl Start {
    pub(super) fn new(run: bool) -> Start {
        Start { run, ..Start::default() }
    }

    /// Looks for a moment; whether there is more to see.
    pub(super) fn look(
        &mut self,
        qmp: &mut Qmp,
        control: &Control,
        paused: bool,
        limits: (Duration, Duration),
        address: &str,
    ) -> Result<bool, Failure> {
        match qmp.wait_event(&["RESUME"], MOMENT) {
            Ok(Some(event)) => self.running = Some(event.seen),
            Ok(None) => {}
            // If QEMU goes away the server finds out itself, and says it better.
            Err(_) => return Ok(false),
        }
        if self.running.is_some() || control.progress().phase < Phase::Started {
            return Ok(self.running.is_none());
        }
        let loaded = *self.loaded.get_or_insert_with(Instant::now);
        if paused {
            self.paused = true;
            return Ok(false);
        }
        if self.asked.unwrap_or(loaded).elapsed() < AGAIN {
            return Ok(true);
        }
        self.asked = Some(Instant::now());
        // Its main thread may be held up.
        qmp.set_limit(limits.0);
        let state = qmp.run_state();
        qmp.set_limit(limits.1);
        match state.as_deref() {
            Ok("running") => self.running = Some(Instant::now()),
            Ok("inmigrate") if loaded.elapsed() > GRACE => {
                control.stop();
                return Err(not_running(qmp, "inmigrate", address));
            }
            Ok("inmigrate") | Err(QmpError::Timeout { .. }) => return Ok(true),
            // What it refuses is told at the end.
            Ok("paused" | "prelaunch") if self.run && qmp.execute("cont", json!({})).is_ok() => return Ok(true),
            Ok("paused" | "prelaunch") => self.paused = true,
            Ok(_) | Err(_) => {}
        }
        Ok(false)
    }
}

/// The state that a guest is in that has everything.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) state: String,
    /// If it is paused as it should be, why: for programs and for people.
    pub(super) why: Option<(&'static str, String)>,
}

/// Looks how a guest is that has everything; `run` starts it. One that does not run as it should is an error.
pub(super) fn settled(
    waiting: &mut Waiting<'_>,
    run: bool,
    recovered: bool,
    address: &str,
) -> Result<Settled, Failure> {
    let mut state = waiting.qmp.run_state()?;
    if run && matches!(state.as_str(), "paused" | "prelaunch") {
        resume::resume(waiting.qmp, address)?;
        state = waiting.qmp.run_state()?;
    }
    let paused = |name, text: String| Settled { state: "paused".to_owned(), why: Some((name, text)) };
    match (state.as_str(), &waiting.paused) {
        // One that sleeps will wake.
        ("running" | "suspended", _) => Ok(Settled { state, why: None }),
        ("paused" | "prelaunch", Some(why)) => Ok(paused(why.name(), why.to_string())),
        ("paused" | "prelaunch", None) => match disks::held(waiting.qmp)? {
            Some(_) => Err(not_running(waiting.qmp, &state, address)),
            None if recovered => Ok(paused("before", "it was so before the recovery".to_owned())),
            None => Ok(paused("started-with-S", STARTED_WITH_S.to_owned())),
        },
        _ => Err(not_running(waiting.qmp, &state, address)),
    }
}

/// Why a guest that has all that it needs does not run, and what to do.
pub(crate) fn not_running(qmp: &mut Qmp, state: &str, address: &str) -> Failure {
    let resume = format!("fastload resume --qmp {address}");
    let loaded = "the guest was loaded, but it does not run";
    match state {
        "inmigrate" => {
            let cause = match disks::held(qmp) {
                Ok(Some(held)) => held.to_string(),
                _ => "its standard error says why (a disk image that another process holds, perhaps)".to_owned(),
            };
            Lost(format!(
                "QEMU could not start the guest: {cause}. It can't do so any more: end it, start it anew with -incoming \
                 defer, and load again when the image is free; or load with --paused, and when the image is free: {resume}"
            ))
            .into()
        }
        "paused" | "prelaunch" => not_started(qmp, state, "QEMU left it paused", address),
        "io-error" => format!(
            "{loaded}: a disk failed, and QEMU stopped it (io-error; its events and its standard error say more). When the \
             disk is well again: {resume}"
        )
        .into(),
        "guest-panicked" => format!("{loaded}: its kernel has crashed (guest-panicked)").into(),
        "internal-error" => {
            format!("{loaded}: QEMU can't go on with it (internal-error); its standard error says why").into()
        }
        "shutdown" => format!("{loaded}: it has shut itself down (shutdown)").into(),
        "watchdog" => format!("{loaded}: its watchdog has expired (watchdog). To let it go on: {resume}").into(),
        other => format!("{loaded}: it is {other}").into(),
    }
}

/// QEMU did not start a guest that is paused.
pub(crate) fn not_started(qmp: &mut Qmp, state: &str, why: &str, address: &str) -> Failure {
    match disks::held(qmp) {
        Ok(Some(held)) => {
            format!("the guest is {state}: {held}. When the image is free: fastload resume --qmp {address}").into()
        }
        _ => format!("the guest is {state}: {why}. To start it: fastload resume --qmp {address}").into(),
    }
}
