//! The run state in the file of a guest that was stopped only for the capture.

use crate::commands::Failure;

/// The device state, saying that the guest was running, where it says that it was paused. The section `globalstate` (QEMU
/// migration/global_state.c) has the length of the name with its NUL, and a fixed field for the name, which is zero behind it.
pub(super) fn as_running(device_state: &[u8]) -> Result<Vec<u8>, Failure> {
    // Its name with its length, its instance and its version.
    let header = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
    let mut changed = device_state.to_vec();
    let mut found = device_state.windows(header.len()).enumerate().filter(|(_, window)| *window == &header[..]);
    let Some((at, _)) = found.next() else {
        // A machine without it says nothing, and its guest is taken to be running.
        return Ok(changed);
    };
    let body = at + header.len();
    let paused = b"\0\0\0\x07paused\0\0";
    let running = b"\0\0\0\x08running\0";
    match changed.get_mut(body..body + paused.len()) {
        Some(state) if state == paused && found.next().is_none() => state.copy_from_slice(running),
        _ => return Err("the run state in the device state is not the one that QEMU has saved".into()),
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_paused_guest_becomes_a_running_one_and_nothing_else_changes() {
        let section = |state: &[u8]| {
            let mut bytes = b"before\x0bglobalstate\0\0\0\0\0\0\0\x01\0\0\0".to_vec();
            bytes.push(u8::try_from(state.len() + 1).unwrap());
            bytes.extend_from_slice(state);
            bytes.resize(200, 0);
            bytes
        };
        assert_eq!(as_running(&section(b"paused")).unwrap(), section(b"running"));
        for state in [&b"io-error"[..], b"running", b""] {
            assert!(as_running(&section(state)).is_err());
        }
        let twice = [section(b"paused"), section(b"paused")].concat();
        assert!(as_running(&twice).is_err());
        let mut cut = section(b"paused");
        cut.truncate(32);
        assert!(as_running(&cut).is_err());
        assert_eq!(as_running(b"nothing").unwrap(), b"nothing");
    }
}
