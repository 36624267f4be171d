//! Frozen memory: what guest memory was at one moment, as a source of pages, while the guest runs on.
//!
//! A freeze is three calls. [`Freezer::prepare`] makes everything that can fail before the guest is stopped.
//! [`Freezer::arm`] write-protects what is populated, while no vCPU runs; that is the freeze point. From then on a page
//! that is about to be written is copied away first and its writer let go at once; the other pages are copied in the
//! background and released in large pieces. [`Frozen`] is a [source](page_source::OneShot): started, it pushes each page
//! exactly once, those that are written first.
//!
//! Memory that an engine is still loading is frozen with the engine ([`Engine::freezer`](crate::Engine::freezer)): its
//! handlers serve the writers too, what it installs from then on comes write-protected, and what is missing is taken
//! from the engine's source without being brought into the memory. An engine that becomes complete between the
//! preparation and the freeze point hands the memory over.
//!
//! Which pages exist is found out here, and nowhere else ([`populated`]).

mod arm;
mod error;
mod file;
mod freeze;
mod freezer;
mod frozen;
mod known;
mod locate;
mod order;
mod owner;
mod pool;
mod populate;
mod saved;
mod saver;
mod writers;
mod zone;

pub use error::{FreezeError, FrozenError};
pub use freezer::{FreezeOptions, Freezer};
pub use frozen::{FreezeHandle, FreezeStats, Frozen};
pub use populate::populated;
