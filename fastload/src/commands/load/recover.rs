//! Going on after a crash: finds out what became of the guest, and lets QEMU listen again.

use std::time::Duration;

use fastload_qmp::Qmp;
use serde_json::json;

use super::keeper::Coming;
use super::{Beside, Note, Waiting};
use crate::commands::Failure;

/// How long QEMU may take to notice that its connection is gone.
const NOTICE: Duration = Duration::from_secs(10);

/// Makes a QEMU whose guest waits for missing pages listen for a new server.
pub(super) fn listen<'a>(
    qmp: &'a mut Qmp,
    beside: &Beside,
    note: Option<&Note>,
    keeper: Coming,
) -> Result<Waiting<'a>, Failure> {
    let until = std::time::Instant::now() + NOTICE;
    let mut told = false;
    loop {
        let (state, why) = qmp.migration()?;
        match state.as_str() {
            "postcopy-paused" => return Waiting::again(qmp, beside, note, keeper),
            // An attempt that did not come to an end, or a connection that only looks alive.
            // Or else QEMU (10.2 and later) is about to start the guest, or to end.
            "postcopy-active" | "postcopy-device" | "postcopy-recover" | "postcopy-recover-setup" | "failing"
                if std::time::Instant::now() < until =>
            {
                if !told && matches!(state.as_str(), "postcopy-active" | "postcopy-recover") {
                    told = true;
                    // Refused if it has just noticed by itself.
                    let _ = qmp.execute("migrate-pause", json!({}));
                }
                qmp.wait_event(&["MIGRATION"], Duration::from_millis(20))?;
            }
            "completed" => return Err("there is nothing to recover: the guest has all of its memory".into()),
            "none" => return Err("there is nothing to recover: no snapshot was being loaded into this QEMU".into()),
            other => {
                let why = why.map(|why| format!(" ({why})")).unwrap_or_default();
                return Err(format!("QEMU can't recover: its migration is {other}{why}").into());
            }
        }
    }
}
