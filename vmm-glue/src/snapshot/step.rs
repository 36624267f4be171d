//! The steps of a restore, and what each takes.

use std::time::{Duration, Instant};

/// A step of a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Opening the file and mapping it.
    Open,
    /// Reading the device state, and checking that this host can have it.
    State,
    /// Mapping guest memory.
    Memory,
    /// Loading all pages (eager), or starting the engine (on demand).
    Pages,
    /// Creating VM, slots, chips and vCPUs.
    Machine,
    /// Putting the state into them.
    Load,
    /// The vCPUs' threads: until the first begins to make the machine, and from when its vCPU is ready.
    Threads,
}

/// Notes what each step takes.
pub(super) struct Clock {
    last: Instant,
    pub(super) steps: Vec<(Step, Duration)>,
}

impl Clock {
    pub(super) fn going_on(steps: &[(Step, Duration)]) -> Clock {
        Clock { last: Instant::now(), steps: steps.to_vec() }
    }

    pub(super) fn done(&mut self, step: Step) {
        let now = Instant::now();
        self.steps.push((step, now - self.last));
        self.last = now;
    }
}
