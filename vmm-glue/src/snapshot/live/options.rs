//! How to take a live snapshot.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use uffd_engine::FreezeOptions;

use crate::GuestRam;

/// How to take a live snapshot.
#[derive(Clone)]
#[non_exhaustive]
pub struct LiveOptions {
    /// The machine type that the file names.
    pub machine: String,
    /// How long the vCPUs have to stop.
    pub stop_limit: Duration,
    /// The pool of copied pages, and the threads that serve write faults.
    pub freeze: FreezeOptions,
    /// Whether to refuse before anything stops if not all pages that exist fit where the file is to be. Zero pages take
    /// no space in it: a guest that has many may be saved without the check; a full disk is an error then, no harm.
    pub check_space: bool,
    /// Whether to refuse before anything stops if this process has shared memory of the guest mapped a second time, where
    /// it can be written to and no write is caught. A caller that has such a mapping, and knows that nothing is written
    /// there between the freeze point and the end of the snapshot, may do without the check.
    pub check_mappings: bool,
    drain: Option<Arc<Drain>>,
    observer: Option<Arc<Observer>>,
}

type Drain = dyn Fn(&GuestRam) -> Result<(), String> + Send + Sync;
type Observer = dyn Fn(&LiveEvent) + Send + Sync;

impl Default for LiveOptions {
    /// Machine `vmm-glue`, five seconds to stop, the engine's own defaults, the space and the mappings checked.
    fn default() -> LiveOptions {
        LiveOptions {
            machine: "vmm-glue".into(),
            stop_limit: Duration::from_secs(5),
            freeze: FreezeOptions::default(),
            check_space: true,
            check_mappings: true,
            drain: None,
            observer: None,
        }
    }
}

impl fmt::Debug for LiveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveOptions")
            .field("machine", &self.machine)
            .field("stop_limit", &self.stop_limit)
            .field("freeze", &self.freeze)
            .field("check_space", &self.check_space)
            .field("check_mappings", &self.check_mappings)
            .finish_non_exhaustive()
    }
}

/// What happens while a live snapshot is taken.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum LiveEvent {
    /// The snapshot shows the moment just past, and the guest runs again.
    FreezePoint {
        /// How long no vCPU ran: [`Duration::as_micros`].
        blackout: Duration,
    },
}

impl fmt::Display for LiveEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LiveEvent::FreezePoint { blackout } => {
                write!(f, "freeze point: the guest stood still for {} \u{b5}s", blackout.as_micros())
            }
        }
    }
}

impl LiveOptions {
    /// The file names this machine type.
    #[must_use]
    pub fn with_machine(mut self, machine: impl Into<String>) -> LiveOptions {
        self.machine = machine.into();
        self
    }

    /// The vCPUs have this long to stop.
    #[must_use]
    pub fn with_stop_limit(mut self, limit: Duration) -> LiveOptions {
        self.stop_limit = limit;
        self
    }

    /// Memory is frozen so.
    #[must_use]
    pub fn with_freeze(mut self, freeze: FreezeOptions) -> LiveOptions {
        self.freeze = freeze;
        self
    }

    /// No check of the free space: see [`check_space`](LiveOptions::check_space).
    #[must_use]
    pub fn unchecked_space(mut self) -> LiveOptions {
        self.check_space = false;
        self
    }

    /// No check of the mappings: see [`check_mappings`](LiveOptions::check_mappings).
    #[must_use]
    pub fn unchecked_mappings(mut self) -> LiveOptions {
        self.check_mappings = false;
        self
    }

    /// `drain` is called on the calling thread when no vCPU runs any more and before memory is frozen. It lets device
    /// models, direct I/O and whatever else writes to the guest's memory come to rest. Device models that write through
    /// the mapping that the guest has may go on after [`LiveEvent::FreezePoint`], or when the call returns an error. So
    /// may direct I/O that is begun into that mapping then, since pinning its pages is a write to them; but not into
    /// buffers that were registered before (`io_uring`). Whatever goes around that mapping may go on only when the
    /// snapshot is complete.
    ///
    /// It is called once, and its time is part of the blackout. An error means that something could not be stopped: there is
    /// no snapshot then, and the guest goes on.
    #[must_use]
    pub fn with_drain(
        mut self,
        drain: impl Fn(&GuestRam) -> Result<(), String> + Send + Sync + 'static,
    ) -> LiveOptions {
        self.drain = Some(Arc::new(drain));
        self
    }

    /// `observer` is told of the freeze point, on the calling thread. Saving begins when it returns: until then writers of
    /// the guest go on only as long as there is space for copies in the [pool](FreezeOptions::pool).
    #[must_use]
    pub fn with_observer(mut self, observer: impl Fn(&LiveEvent) + Send + Sync + 'static) -> LiveOptions {
        self.observer = Some(Arc::new(observer));
        self
    }

    pub(super) fn drain(&self, ram: &GuestRam) -> Result<(), String> {
        self.drain.as_ref().map_or(Ok(()), |drain| drain(ram))
    }

    pub(super) fn tell(&self, event: &LiveEvent) {
        if let Some(observer) = &self.observer {
            observer(event);
        }
    }
}
