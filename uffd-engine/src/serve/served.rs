//! What handlers call: they know neither a load nor a freeze.

use std::sync::Arc;
use std::time::Instant;

use page_units::HostAddr;

use crate::EngineError;
use crate::memory::{Memory, Place};

/// A missing or minor fault that a handler has read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) addr: HostAddr,
    /// The file behind the memory holds the page: it only has to be mapped.
    pub(crate) minor: bool,
    /// When it was read.
    pub(crate) since: Instant,
}

/// What is told of discards.
pub(crate) trait Discarded {
    /// A granule is Removed now. `requested`: a request for it was on its way, and is answered by this.
    fn discarded(&self, at: Place, requested: bool);
}

/// What serves the faults of some memory.
pub(crate) trait Served: Discarded + Send + Sync {
    fn memory(&self) -> &Arc<Memory>;

    /// Serves a fault.
    fn fault(&self, fault: Fault);

    /// Serves a fault again that could not be served before an event was read.
    fn fault_again(&self, at: Place);

    /// Faults can't be served any more.
    fn fail(&self, error: EngineError);
}
