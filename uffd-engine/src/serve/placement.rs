//! On which cores the threads of an engine run.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::StartError;

/// Binds this thread to a core, if that exists.
pub(crate) fn bind(cpu: Option<usize>) {
    let Some(cpu) = cpu else { return };
    let mut set = CpuSet::new();
    if let Err(errno) = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
        log::warn!("binding a thread of the engine to core {cpu} failed: {errno}");
    }
}

/// Whether threads can be bound to all of these cores. What a thread may use is seldom more than what it uses now, and the
/// kernel tells: it leaves out what it does not grant.
pub(crate) fn check_cores<'a>(cores: impl Iterator<Item = &'a usize>) -> Result<(), StartError> {
    let Some(before) = affinity() else { return Ok(()) };
    let mut wanted = before;
    let mut beyond = Vec::new();
    for &core in cores {
        if !before.is_set(core).unwrap_or(false) {
            wanted.set(core).map_err(|_| StartError::Core(core))?;
            beyond.push(core);
        }
    }
    if beyond.is_empty() || sched_setaffinity(Pid::from_raw(0), &wanted).is_err() {
        return Ok(());
    }
    let granted = affinity();
    set_affinity(Some(before));
    let refused = |core: &usize| granted.is_some_and(|granted| !granted.is_set(*core).unwrap_or(false));
    beyond.into_iter().find(refused).map_or(Ok(()), |core| Err(StartError::Core(core)))
}

/// The cores that this thread may run on.
pub(crate) fn affinity() -> Option<CpuSet> {
    sched_getaffinity(Pid::from_raw(0)).ok()
}

/// Puts back what [`affinity`] said.
pub(crate) fn set_affinity(set: Option<CpuSet>) {
    if let Some(Err(errno)) = set.map(|set| sched_setaffinity(Pid::from_raw(0), &set)) {
        log::warn!("putting back the cores of a thread failed: {errno}");
    }
}
