//! Guest memory on demand: a generic userfaultfd engine.
//!
//! An [`Engine`] serves [`Region`]s of virtual memory from any [`PageSource`](page_source::PageSource): a page that is
//! touched comes at once, the others come in the background, and when all are there the memory is ordinary memory
//! again. It knows nothing of files, sockets, snapshot formats or KVM.
//!
//! ```
//! # use std::sync::Arc;
//! # use page_files::{FlatBlock, FlatFile};
//! # use page_units::{BlockId, ByteLen, Layout};
//! use uffd_engine::{Engine, Mapping, Region};
//!
//! # if !testkit::require::have(&[testkit::require::Prerequisite::Userfaultfd]) { return Ok(()); }
//! # let file = tempfile::NamedTempFile::new()?;
//! # std::fs::write(file.path(), vec![7; 1 << 20])?;
//! let layout = Layout::single("ram", ByteLen(1 << 20))?;
//! let source = FlatFile::open(file.path(), FlatBlock::concatenated(layout.blocks().to_vec())?)?;
//! let memory = Arc::new(Mapping::anonymous(layout.total())?);
//! let region = Region::of(&memory, layout.run_of(BlockId(0)).ok_or("no block")?);
//! let engine = Engine::builder().region(region).source(Arc::new(source)).start()?;
//! # let mut byte = [0];
//! # memory.read(ByteLen(500_000), &mut byte);
//! # assert_eq!(byte, [7]);
//! # engine.wait()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
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
pub use engine::{Completion, Engine, Waiting};
pub use error::{DiscardError, EngineError, Errno, OpenError, StartError};
pub use freeze::{FreezeError, FreezeHandle, FreezeOptions, FreezeStats, Freezer, Frozen, FrozenError, populated};
pub use measure::Measured;
pub use memory::backing::Backing;
pub use memory::descriptor::Descriptor;
pub use memory::mapping::Mapping;
pub use memory::region::Region;
pub use options::{Background, Discards, Event, FailurePolicy, Handlers, Wait, WhenComplete};
#[cfg(feature = "pause-points")]
pub use pause::PausePoint;
pub use stats::{Latency, Stats};
pub use sys::abi::Features;
