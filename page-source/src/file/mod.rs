//! Sources that are local files: what they share.
//!
//! A `MappedFile` is mapped and watched; `Places` says what each page is and where; `FileFeed` answers requests
//! from both on the calling thread.

mod ahead;
mod extents;
mod feed;
mod flat;
mod identity;
mod mapped;
#[cfg(feature = "mapped-ram")]
mod mapped_ram;

use feed::{FileFeed, Places};
pub use flat::{FlatBlock, FlatFile};
use mapped::MappedFile;
#[cfg(feature = "mapped-ram")]
pub use mapped_ram::MappedRam;
