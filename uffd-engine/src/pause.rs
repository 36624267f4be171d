//! Named points at which a test can hold a thread of the engine. Without the feature `pause-points` they are nothing.

/// Where a thread of the engine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[cfg_attr(not(feature = "pause-points"), expect(unreachable_pub, reason = "it is exported with that feature"))]
pub enum PausePoint {
    /// Pages are claimed, the install has not begun.
    Claimed,
    /// An install has happened, the page map does not say so yet.
    Installed,
    /// A discard was read and is not in the page map yet.
    DiscardRead,
    /// A fault was read, and nothing was done about it yet.
    FaultRead,
    /// The only handler is inside the gate, and is about to wait for a message there.
    WaitsInside,
    /// A discard was announced, and a granule of it is not marked in the page map yet.
    Discarding,
    /// A piece of a huge page has come, whose other pages are (or were) still missing.
    Piece,
    /// Everything is there; the regions are still registered.
    Completing,
    /// While memory is frozen: a page was copied for its writer, and is neither in the pool's queue nor called saved yet.
    Copied,
    /// While memory is frozen: a page is claimed for its writer, and the pool has no space for it.
    PoolFull,
    /// While memory is frozen: that claim was given back, and the writer waits.
    WriterWaits,
    /// While memory is frozen: the saver came to a page that another thread has claimed or saved.
    NothingGathered,
}

/// Called at each point, on the thread that reaches it.
#[cfg(feature = "pause-points")]
#[derive(Clone)]
pub(crate) struct Pauses(pub(crate) std::sync::Arc<dyn Fn(PausePoint) + Send + Sync>);

/// Nothing.
#[cfg(not(feature = "pause-points"))]
#[derive(Clone, Debug, Default)]
pub(crate) struct Pauses(());

#[cfg(feature = "pause-points")]
impl Default for Pauses {
    fn default() -> Pauses {
        Pauses(std::sync::Arc::new(|_| ()))
    }
}

#[cfg(feature = "pause-points")]
impl std::fmt::Debug for Pauses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pauses")
    }
}

impl Pauses {
    #[cfg(feature = "pause-points")]
    pub(crate) fn at(&self, point: PausePoint) {
        (self.0)(point);
    }

    #[cfg(not(feature = "pause-points"))]
    #[inline(always)]
    pub(crate) fn at(&self, _: PausePoint) {}
}
