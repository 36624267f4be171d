//! Connecting to a QEMU that may be busy.

use std::time::Duration;

use fastload_qmp::{Qmp, QmpAddress, QmpError};

/// How long QEMU may take for one QMP command.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long somebody whom we can name may hold the monitor before that is said.
const HELD: Duration = Duration::from_secs(5);

/// Connects, and gives up early if it is known who is in the way: another client, or a QEMU that was stopped.
pub(crate) fn connect(address: &QmpAddress) -> Result<Qmp, QmpError> {
    let in_the_way = |error: &QmpError| match error {
        QmpError::NoGreeting { there, .. } => {
            !there.clients.is_empty() || there.listener.as_ref().is_some_and(|qemu| qemu.stopped)
        }
        QmpError::Mute { qemu, .. } => qemu.as_ref().is_some_and(|qemu| qemu.stopped),
        _ => true,
    };
    match Qmp::connect(address, HELD) {
        Err(error) if !in_the_way(&error) => Qmp::connect(address, PATIENCE),
        connected => connected.map(|mut qmp| {
            qmp.set_limit(PATIENCE);
            qmp
        }),
    }
}
