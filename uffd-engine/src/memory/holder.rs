//! What the memory has to ask of a freeze, and a freeze of the load, so that neither knows the other.

use std::fmt::Debug;

use page_source::SourceError;
use page_units::{HostAddr, PageRun};

use super::place::Place;
use crate::EngineError;

/// A freeze under way, as the gate and an install see it. Called with the gate held.
pub(crate) trait Holder: Debug + Send + Sync {
    /// Whether nothing of it is needed any more.
    fn has_ended(&self) -> bool;

    /// Whether an install of some granules has to be write-protected, since not all of them are saved.
    fn protects(&self, at: Place, granules: usize) -> bool;

    /// Zeros are about to be installed: whether the caller is the one who says what comes of it.
    fn claim_hole(&self, at: Place) -> bool;

    /// What came of it.
    fn end_hole(&self, at: Place, installed: bool);

    /// Serves a write. `false` if it has to be tried again after an event was read.
    fn write(&self, at: Place) -> bool;

    /// Whether something between two addresses is not saved yet.
    fn needs(&self, start: HostAddr, end: HostAddr) -> bool;

    /// A range was given back. The part that was not saved is lost to the snapshot.
    fn given_back(&self, start: HostAddr, end: HostAddr);

    /// The engine that loads the memory has failed. The gate need not be held.
    fn engine_failed(&self, error: &EngineError);

    /// Takes the protection off, after it has ended. The gate is not held.
    fn thaw(&self);
}

/// Where the content of a granule is that was missing at the freeze point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MissingContent {
    /// Nowhere: it is zero.
    Zero,
    /// In the source, from which [`Fetch::fetch`] gets it.
    Source,
    /// It has just been mapped, and is in the memory now.
    Mapped,
    /// Not known yet: an install is under way, or was asked for.
    Soon,
}

/// Why content could not be fetched.
#[derive(Debug)]
pub(crate) enum FetchError {
    /// Nobody needs it any more.
    Over,
    /// The source has none.
    Source(SourceError),
}

/// The load of a memory, as a freeze sees it.
pub(crate) trait Fetch: Debug + Send + Sync {
    /// Whether the load has neither ended nor failed.
    fn running(&self) -> bool;

    /// Waits until a load that is not running any more has let the memory go.
    ///
    /// # Errors
    /// If it has failed.
    fn complete(&self) -> Result<(), EngineError>;

    /// Where the content of a Missing granule is, or of one that is Zero or Removed if the file has it. `in_file`: the file behind shared memory holds something.
    fn missing(&self, at: Place, in_file: bool) -> MissingContent;

    /// The content of some pages, which lie in one block, straight from the source. Waits for it, but not when `over`.
    fn fetch(&self, run: PageRun, to: &mut [u8], over: &dyn Fn() -> bool) -> Result<(), FetchError>;

    /// Whether what the source delivered can be trusted.
    fn vouch(&self) -> Result<(), SourceError>;

    /// A freeze has ended: the load may be complete. `thaw`: the protection is to be taken off, which can't be done
    /// on this thread.
    fn freeze_ended(&self, thaw: bool);
}
