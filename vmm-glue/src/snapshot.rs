//! Snapshots of machines: saved, opened, restored.

pub(crate) mod blueprint;
mod host_check;
mod live;
#[cfg(feature = "vcpus")]
mod options;
#[cfg(feature = "vcpus")]
mod report;
#[cfg(feature = "vcpus")]
mod restore;
mod save;
mod saved;
mod step;

pub use self::host_check::host_check;
pub use self::live::{
    Blackout, LiveError, LiveEvent, LiveOptions, LiveProgress, LiveReport, LiveSnapshot, snapshot_live,
    snapshot_live_loading,
};
#[cfg(feature = "vcpus")]
pub use self::options::{Observer, RestoreOptions};
#[cfg(feature = "vcpus")]
pub use self::report::{Mode, RestoreReport};
#[cfg(feature = "vcpus")]
pub use self::restore::resume_on_demand;
pub(crate) use self::save::FIRST_DEVICE;
pub use self::save::{SaveError, SaveOptions, Saved, save};
pub use self::saved::{Loaded, RestoreError, SavedVm};
pub use self::step::Step;
