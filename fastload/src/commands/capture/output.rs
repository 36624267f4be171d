//! What is told, to people and to programs.

use std::time::Duration;

use page_units::ByteLen;
use serde_json::{Value, json};

use super::note;
use super::session::Freeze;
use crate::commands::Failure;
use crate::commands::serving::micros;
use crate::event::Event;
use crate::output;

/// Tells of the freeze point, at once.
pub(super) fn frozen(freeze: Freeze, json: bool) -> Result<(), Failure> {
    if freeze.held {
        let blackout = micros(freeze.blackout);
        if json {
            let event = Event::new("resumed").with(json!({
                "frozen_at": when(freeze.at),
                "frozen_at_us": micros(freeze.at),
                "blackout_us": blackout,
            }));
            return Ok(event.print()?);
        }
        note(&format!("running again after {blackout} us, the command included"));
        return Ok(());
    }
    if json {
        let event = Event::new("frozen").with(json!({
            "frozen_at": when(freeze.at),
            "frozen_at_us": micros(freeze.at),
            "blackout_us": micros(freeze.blackout),
        }));
        return Ok(event.print()?);
    }
    note(&format!("frozen at {}, running again after {} us", when(freeze.at), micros(freeze.blackout)));
    Ok(())
}

/// Tells that the guest stands still, and that the command is run now.
pub(super) fn held(at: Duration, json: bool) -> Result<(), Failure> {
    if json {
        let event = Event::new("frozen").with(json!({ "frozen_at": when(at), "frozen_at_us": micros(at) }));
        return Ok(event.print()?);
    }
    note(&format!("frozen at {}, and the command runs", when(at)));
    Ok(())
}

/// What was captured.
#[derive(Debug)]
pub(super) struct Captured {
    pub(super) output: std::path::PathBuf,
    pub(super) machine: String,
    pub(super) ram: ByteLen,
    pub(super) stored: u64,
    pub(super) zero: u64,
    pub(super) device_state: u64,
    /// Bytes of the disk that the file takes.
    pub(super) allocated: u64,
    pub(super) freeze: Option<Freeze>,
    /// Until QEMU had sent everything.
    pub(super) sent: Duration,
    /// Until the file was there.
    pub(super) complete: Duration,
    /// The images that the guest writes to, which are no part of the file.
    pub(super) disks: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Captured {
    pub(super) fn print(&self, json: bool) -> Result<(), Failure> {
        if json {
            return Ok(Event::new("complete").path("output", &self.output).with(self.figures()).print()?);
        }
        let (file, ram) = (self.output.display(), output::size(self.ram.0));
        Ok(output::print(&format!(
            "{file}: {}, {ram} of RAM, {} pages stored, {} zero; {} on the disk after {:.1} s\n",
            self.machine,
            self.stored,
            self.zero,
            indicatif::HumanBytes(self.allocated),
            self.complete.as_secs_f64(),
        ))
        .and_then(|()| {
            self.disks.iter().try_for_each(|disk| output::print(&format!("disk, not part of it: {disk}\n")))
        })?)
    }

    fn figures(&self) -> Value {
        json!({
            "machine": self.machine,
            "ram_bytes": self.ram.0,
            "stored_pages": self.stored,
            "zero_pages": self.zero,
            "device_state_bytes": self.device_state,
            "allocated_bytes": self.allocated,
            "frozen_at": self.freeze.map(|freeze| when(freeze.at)),
            "frozen_at_us": self.freeze.map(|freeze| micros(freeze.at)),
            "blackout_us": self.freeze.map(|freeze| micros(freeze.blackout)),
            "sent_us": micros(self.sent),
            "complete_us": micros(self.complete),
            "disks": self.disks,
            "warnings": self.warnings,
        })
    }
}

/// A time since 1970 as people read it (RFC 3339, UTC).
fn when(at: Duration) -> String {
    let time = std::time::UNIX_EPOCH.checked_add(at).unwrap_or(std::time::UNIX_EPOCH);
    humantime::format_rfc3339_micros(time).to_string()
}
