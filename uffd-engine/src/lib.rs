//! Guest memory on demand: a generic userfaultfd engine.
//!
//! An [`Engine`] serves [`Region`]s of virtual memory from any [`PageSource`](page_source::PageSource): a page that is
//! touched comes at once, the others come in the background, and when all are there the memory is ordinary memory
//! again. It knows nothing of files, sockets, snapshot formats or KVM.
//!
//! A page of the source is never replaced by zeros or by stale bytes. When content is unavailable, what is missing
//! is poisoned, so that any access to it is an error, before anything is closed.

#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
mod builder;
mod engine;
mod error;
mod freeze;
mod load;
mod measure;
mod memory;
mod options;
mod pause;
mod serve;
mod stats;
mod sys;

pub use builder::Builder;
pub use engine::{Completion, Engine};
pub use error::{DiscardError, EngineError, OpenError, StartError};
pub use freeze::{FreezeError, FreezeHandle, FreezeOptions, FreezeStats, Freezer, Frozen, FrozenError, populated};
pub use measure::Measured;
pub use memory::descriptor::Descriptor;
pub use memory::region::{Backing, Region};
pub use options::{Background, Discards, Event, FailurePolicy, Handlers, Wait};
pub use pause::PausePoint;
pub use stats::{Latency, Stats};
pub use sys::abi::Features;
