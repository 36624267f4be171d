//! The units in which every crate of this workspace names guest memory.
//!
//! A *RAM block* ([`RamBlock`]) is a named piece of guest RAM, a *page* is 4 KiB and the unit of content, and a
//! [`PageRun`] is a run of pages inside one block. Addresses and offsets are newtypes ([`GuestAddr`], [`HostAddr`],
//! [`FileOffset`]), so that a guest-physical address can never be taken for a position in a file.
//!
//! ```
//! use page_units::{BlockId, ByteLen, Layout, PageCount, PageIndex, PageRun, PageSize, RamBlock};
//!
//! let layout = Layout::new(vec![RamBlock::new("pc.ram", ByteLen(64 << 20), PageSize::SMALL)?])?;
//! let whole = layout.run_of(BlockId(0)).unwrap();
//! assert_eq!(whole, PageRun::new(BlockId(0), PageIndex(0), PageCount(16384)));
//! assert_eq!(whole.split_at(PageCount(256)).0.len(), ByteLen(1 << 20));
//! # Ok::<(), page_units::LayoutError>(())
//! ```

mod layout;
mod run;
mod unit;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub use layout::{BlockId, Layout, LayoutError, PageSize, RamBlock};
pub use run::PageRun;
pub use unit::{ByteLen, FileOffset, GuestAddr, HostAddr, PAGE_SHIFT, PAGE_SIZE, PageCount, PageIndex};

/// The examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
