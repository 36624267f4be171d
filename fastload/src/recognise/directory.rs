//! Snapshots that are directories.

use std::path::Path;

use crate::commands::serving::quoted;

/// What the directory is, if that is known.
pub(super) fn at(path: &Path) -> Option<String> {
    let has = |name: &str| path.join(name).is_file();
    // Cloud Hypervisor, docs/snapshot_restore.md.
    if has("state.json") && has("memory-ranges") {
        let memory = quoted(&path.join("memory-ranges"));
        return Some(format!(
            "it is the directory of a snapshot that Cloud Hypervisor took: no QEMU loads its device state, Cloud \
             Hypervisor does (--restore source_url=file://DIRECTORY); its memory is flat: fastload convert {memory} \
             OUT --template SNAPSHOT"
        ));
    }
    None
}
