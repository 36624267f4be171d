//! Our vCPUs as a [`Machine`] that can be saved.

use std::sync::Arc;
use std::time::Duration;

use vmstate::Section;

use super::Vcpus;
use super::table::Hold;
use crate::{GuestRam, Held, Host, Machine, StateError, StopError};

impl Machine for Vcpus {
    fn ram(&self) -> &Arc<GuestRam> {
        Vcpus::ram(self)
    }

    fn hold(&self, limit: Duration) -> Result<Box<dyn Held + '_>, StopError> {
        // Lets them go again, should they not stop in time.
        let held = HeldVcpus { vcpus: self, hold: Some(self.group.hold()) };
        self.wait_stopped(limit)?;
        Ok(Box::new(held))
    }
}

/// vCPUs that stand still, for a moment or for longer.
struct HeldVcpus<'a> {
    vcpus: &'a Vcpus,
    /// Which ones ran, if they are to run again.
    hold: Option<Hold>,
}

impl Held for HeldVcpus<'_> {
    fn sections(&mut self, host: &Host) -> Result<Vec<Section>, StateError> {
        self.vcpus.save_state(host)?.sections()
    }

    fn keep(mut self: Box<Self>) {
        self.hold = None;
    }
}

impl Drop for HeldVcpus<'_> {
    fn drop(&mut self) {
        if let Some(hold) = &self.hold {
            self.vcpus.group.let_go(hold);
        }
    }
}
