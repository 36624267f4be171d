//! What saving a machine asks of its VMM.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use vmstate::Section;

#[cfg(feature = "vcpus")]
use crate::VcpuError;
use crate::{GuestRam, Host, StateError};

/// No time limit: longer than anything waits, and still a time that can be added to now.
pub(crate) const FOR_EVER: Duration = Duration::from_secs(1 << 32);

/// A machine that can be saved, also while it runs: its memory, and how its vCPUs are made to stand still. The
/// [`Vcpus`](crate::Vcpus) of this crate are one; a VMM with vCPU threads of its own implements it for them
/// (`examples/own_vmm`).
pub trait Machine: Send + Sync {
    /// The guest's memory.
    fn ram(&self) -> &Arc<GuestRam>;

    /// Makes all vCPUs stand still, and returns when they do, at the latest after `limit`.
    ///
    /// What an implementation has to see to:
    /// - No vCPU is in `KVM_RUN`, and none begins it before the guard is dropped. What its last exit asked for is
    ///   completed: after an I/O or MMIO exit KVM finishes the instruction in the next `KVM_RUN`, with `immediate_exit` set.
    /// - It holds nothing that a page fault handler needs, and waits for nothing but vCPUs: one that waits for a page of
    ///   memory inside the kernel may not stop before that is there, hence the limit.
    /// - vCPUs that stood still before (paused, or stopped by a device) do not run afterwards either.
    ///
    /// # Errors
    /// If not all of them stop in time, or one of them can't go on. Those that were stopped for this run again then.
    fn hold(&self, limit: Duration) -> Result<Box<dyn Held + '_>, StopError>;
}

impl<M: Machine + ?Sized> Machine for Arc<M> {
    fn ram(&self) -> &Arc<GuestRam> {
        M::ram(self)
    }

    fn hold(&self, limit: Duration) -> Result<Box<dyn Held + '_>, StopError> {
        M::hold(self, limit)
    }
}

/// vCPUs that stand still. Dropping it lets those run again that ran before, and their guest is told that it was stopped
/// ([`tell_stopped`](crate::state::tell_stopped)).
pub trait Held {
    /// Takes the state of the machine as device sections: those of [`MachineState`](crate::MachineState), and those of the
    /// VMM's own devices, by any other names. Called at most once, after the caller's devices have come to rest.
    ///
    /// # Errors
    /// If it can't be taken: nothing is saved then.
    fn sections(&mut self, host: &Host) -> Result<Vec<Section>, StateError>;

    /// Leaves the vCPUs as they are: they stand still until their VMM lets them run.
    fn keep(self: Box<Self>);
}

/// Why vCPUs did not stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// They are still in `KVM_RUN`: most likely they wait for a page of memory. They stop as soon as it is there.
    #[error(
        "vCPUs {vcpus:?} did not stop within {limit:?}: most likely they wait for pages of memory that have not come yet"
    )]
    Timeout {
        /// Which.
        vcpus: Vec<u32>,
        /// The time they had.
        limit: Duration,
    },
    /// One of them has failed.
    #[cfg(feature = "vcpus")]
    #[error(transparent)]
    Failed(#[from] Arc<VcpuError>),
    /// A VMM's own reason.
    #[error("the vCPUs can't be stopped: {0}")]
    Other(#[source] Box<dyn Error + Send + Sync>),
}
