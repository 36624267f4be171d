//! Connecting to a QEMU that may be busy.

use std::time::Duration;

use fastload_qmp::{Qmp, QmpAddress, QmpError};

/// How long QEMU may take for one QMP command.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Patience {
    /// How long QEMU may take to answer a command, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    timeout: u64,
}

impl Patience {
    pub(crate) fn get(self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

/// How long somebody whom we can name may hold the monitor before that is said.
const HELD: Duration = Duration::from_secs(5);

/// Connects, and gives up early if it is known who is in the way: another client, or a QEMU that was stopped.
pub(crate) fn connect(address: &QmpAddress, patience: Patience) -> Result<Qmp, QmpError> {
    let in_the_way = |error: &QmpError| match error {
        QmpError::NoGreeting { there, .. } => {
            !there.clients.is_empty() || there.listener.as_ref().is_some_and(|qemu| qemu.stopped)
        }
        QmpError::Mute { qemu, .. } => qemu.as_ref().is_some_and(|qemu| qemu.stopped),
        _ => true,
    };
    let patience = patience.get();
    match Qmp::connect(address, HELD.min(patience)) {
        Err(error) if !in_the_way(&error) && patience > HELD => Qmp::connect(address, patience),
        connected => connected.map(|mut qmp| {
            qmp.set_limit(patience);
            qmp
        }),
    }
}
