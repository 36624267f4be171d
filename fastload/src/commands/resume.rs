//! `fastload resume`: starts a guest that was loaded paused.

use std::time::{Duration, Instant};

use fastload_qmp::{Qmp, QmpAddress, QmpError};
use serde_json::json;

use super::load::state;
use super::{Failure, monitor, serving};
use crate::event::Event;
use crate::{output, parse};

/// How long QEMU may take to start a guest after it has said that it will.
const START: Duration = Duration::from_secs(5);

/// Start a guest that is paused, and make sure that it runs.
///
/// It does what the QMP command `cont` and `virsh resume` do, and then looks whether the guest runs.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  fastload load vm.snap --qmp /run/vm.qmp --paused
  fastload resume --qmp /run/vm.qmp")]
pub(crate) struct Resume {
    /// QEMU's QMP socket: a path, unix:PATH, or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDRESS", value_parser = parse::qmp())]
    qmp: QmpAddress,
    #[command(flatten)]
    patience: monitor::Patience,
    /// Print JSON, one event per line.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Resume {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let mut qmp = monitor::connect(&self.qmp, self.patience)?;
        resume(&mut qmp, &serving::address(&self.qmp))?;
        if self.json {
            return Ok(Event::new("complete").with(json!({"state": "running"})).print()?);
        }
        Ok(output::print("running\n")?)
    }
}

/// Starts the guest of a QEMU, whose address a command line would have so.
pub(crate) fn resume(qmp: &mut Qmp, address: &str) -> Result<(), Failure> {
    let before = qmp.run_state()?;
    if before == "running" {
        return Ok(());
    }
    let (migration, _) = qmp.migration()?;
    if before == "inmigrate" && migration != "completed" {
        return Err(format!(
            "QEMU waits for a snapshot (it is inmigrate, migration {migration}): fastload load FILE --qmp {address}"
        )
        .into());
    }
    match qmp.execute("cont", json!({})) {
        Err(error @ QmpError::Refused { .. }) => {
            return Err(state::not_started(qmp, &before, &error.to_string(), address));
        }
        done => _ = done?,
    }
    let until = Instant::now() + START;
    loop {
        let now = qmp.run_state()?;
        if now == "running" {
            return Ok(());
        }
        // It passes through others on its way.
        if Instant::now() > until || (now != before && now != "inmigrate") {
            return Err(state::not_running(qmp, &now, address));
        }
        qmp.wait_event(&["RESUME"], Duration::from_millis(20))?;
    }
}
