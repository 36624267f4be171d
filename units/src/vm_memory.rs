//! The same units as `vm-memory` has them.

use crate::{FileOffset, GuestAddr};

impl From<vm_memory::GuestAddress> for GuestAddr {
    fn from(address: vm_memory::GuestAddress) -> GuestAddr {
        GuestAddr(address.0)
    }
}

impl From<GuestAddr> for vm_memory::GuestAddress {
    fn from(address: GuestAddr) -> vm_memory::GuestAddress {
        vm_memory::GuestAddress(address.0)
    }
}

/// Where in its file a mapping begins.
impl From<&vm_memory::FileOffset> for FileOffset {
    fn from(offset: &vm_memory::FileOffset) -> FileOffset {
        FileOffset(offset.start())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_go_there_and_back() {
        for address in [0, 1, 0xfff, 1 << 40, u64::MAX] {
            let theirs = vm_memory::GuestAddress::from(GuestAddr(address));
            assert_eq!((theirs.0, GuestAddr::from(theirs)), (address, GuestAddr(address)));
        }
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(FileOffset::from(&vm_memory::FileOffset::new(file, 4096)), FileOffset(4096));
    }
}
