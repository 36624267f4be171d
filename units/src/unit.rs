//! Newtypes over `u64`: what a number counts is part of its type.

use std::fmt;
use std::ops::{Add, AddAssign, Sub};

/// Size of a page in bytes: 4096, the target page size of x86 and the unit of content in every format here.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

/// A position (`$at`) moves by a distance (`$by`), and two positions are a distance apart.
macro_rules! moves_by {
    ($at:ident, $by:ident) => {
        impl Add<$by> for $at {
            type Output = $at;
            fn add(self, by: $by) -> $at {
                $at(self.0 + by.0)
            }
        }
        impl AddAssign<$by> for $at {
            fn add_assign(&mut self, by: $by) {
                self.0 += by.0;
            }
        }
        impl Sub<$at> for $at {
            type Output = $by;
            fn sub(self, from: $at) -> $by {
                $by(self.0 - from.0)
            }
        }
        impl $at {
            /// `self + by`, or `None` where that does not fit: for numbers that came from a file or a peer.
            #[must_use]
            pub fn checked_add(self, by: $by) -> Option<$at> {
                self.0.checked_add(by.0).map($at)
            }
        }
    };
}

unit! {
    /// A guest-physical address, in bytes.
    GuestAddr, "{:#x}"
}
unit! {
    /// A virtual address in the process that owns the guest's memory (not necessarily this one), in bytes.
    HostAddr, "{:#x}"
}
unit! {
    /// A position in a file, in bytes from its start.
    FileOffset, "{:#x}"
}
unit! {
    /// A length in bytes.
    ByteLen, "{}"
}
unit! {
    /// The number of a page inside its RAM block; the first is 0.
    PageIndex, "{}"
}
unit! {
    /// A number of pages of [`PAGE_SIZE`] bytes.
    PageCount, "{}"
}

moves_by!(GuestAddr, ByteLen);
moves_by!(HostAddr, ByteLen);
moves_by!(FileOffset, ByteLen);
moves_by!(ByteLen, ByteLen);
moves_by!(PageIndex, PageCount);
moves_by!(PageCount, PageCount);

impl ByteLen {
    /// How many pages it takes to hold these bytes (the last may be partial).
    #[must_use]
    pub const fn to_pages(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE))
    }

    /// As `usize`, for slices and system calls.
    ///
    /// # Panics
    /// On a target whose `usize` has fewer than 64 bits, if the length does not fit.
    #[must_use]
    pub fn get(self) -> usize {
        usize::try_from(self.0).expect("a length in memory fits usize")
    }

    /// From a length in memory.
    #[must_use]
    pub const fn of(len: usize) -> ByteLen {
        ByteLen(len as u64)
    }
}

impl PageCount {
    /// The length of these pages.
    #[must_use]
    pub const fn to_bytes(self) -> ByteLen {
        ByteLen(self.0 << PAGE_SHIFT)
    }
}

impl PageIndex {
    /// Where the page starts in its block, in bytes.
    #[must_use]
    pub const fn byte_offset(self) -> ByteLen {
        ByteLen(self.0 << PAGE_SHIFT)
    }

    /// The page that holds the byte at `offset` of the block.
    #[must_use]
    pub const fn at_byte(offset: ByteLen) -> PageIndex {
        PageIndex(offset.0 >> PAGE_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_distances() {
        assert_eq!(GuestAddr(0x1000) + ByteLen(0x234), GuestAddr(0x1234));
        assert_eq!(PageIndex(9) - PageIndex(4), PageCount(5));
        assert_eq!(FileOffset(u64::MAX).checked_add(ByteLen(1)), None);
        assert_eq!(ByteLen(1).to_pages(), PageCount(1));
        assert_eq!(PageIndex::at_byte(PageIndex(7).byte_offset()), PageIndex(7));
        assert_eq!(FileOffset(4096).to_string(), "0x1000");
    }
}
