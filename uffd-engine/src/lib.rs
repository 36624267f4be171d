//! Guest memory on demand: a generic userfaultfd engine.
//!
//! An [`Engine`] serves [`Region`]s of virtual memory from any [`PageSource`](page_source::PageSource): a page that is
//! touched comes at once, the others come in the background, and when all are there the memory is ordinary memory
//! again. It knows nothing of files, sockets, snapshot formats or KVM.
//!
//! A page of the source is never replaced by zeros or by stale bytes. When content can't be had, what is missing is
//! poisoned, so that any access to it is an error, before anything is closed.

mod builder;
mod core;
mod deferred;
mod descriptor;
mod doorbell;
mod engine;
mod error;
mod fault;
mod freeze;
mod gate;
mod handler;
mod hints;
mod install;
mod loader;
mod measure;
mod options;
mod outstanding;
mod pause;
mod poison;
mod region;
mod removed;
mod sink;
mod solo;
mod staging;
mod state;
mod stats;
mod status;
mod stored;
mod supervisor;
mod sys;
mod turned_away;
mod waiting;

pub use builder::Builder;
pub use descriptor::Descriptor;
pub use engine::{Completion, DiscardError, Engine};
pub use error::{EngineError, OpenError, StartError};
pub use freeze::{FreezeError, FreezeOptions, FreezeStats, Freezer, Frozen, FrozenError, populated};
pub use measure::Measured;
pub use options::{Background, Discards, Event, FailurePolicy, Handlers, Wait};
pub use pause::PausePoint;
pub use region::{Backing, Region};
pub use stats::{Latency, Stats};
pub use sys::abi::Features;
