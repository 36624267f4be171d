//! Guest memory that KVM knows by its address in this process.
#![expect(unsafe_code, reason = "KVM keeps addresses, which must stay what they are")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::{GuestRam, MemoryError};

impl GuestRam {
    /// Gives the memory to a VM: one slot per piece, numbered from 0 on. Do it **before** creating an irqchip: after
    /// that the first slot costs KVM milliseconds.
    ///
    /// # Errors
    /// If KVM refuses.
    ///
    /// # Safety
    /// KVM keeps the addresses, and the guest reads and writes there: this memory must be dropped after the VM and all of
    /// its vCPUs. (A [`NewVm`](crate::NewVm) sees to that.) Where the guest can write there must be no Rust reference.
    pub unsafe fn set_slots(&self, vm: &VmFd) -> Result<(), MemoryError> {
        for (piece, slot) in self.pieces().iter().zip(0..) {
            let length = piece.run.len();
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: piece.guest.0,
                memory_size: length.0,
                userspace_addr: piece.host.0,
            };
            // SAFETY: the range is mapped as long as this memory lives, which the caller sees to.
            let done = unsafe { vm.set_user_memory_region(region) };
            done.map_err(|error| MemoryError::Slot { guest: piece.guest, length, error: error.into() })?;
        }
        Ok(())
    }
}

#[cfg(feature = "vcpus")]
pub(crate) use owner::VmWithRam;

#[cfg(feature = "vcpus")]
mod owner {
    use std::sync::Arc;

    use kvm_ioctls::VmFd;

    use crate::{GuestRam, MemoryError};

    /// A VM that has its memory.
    #[derive(Debug)]
    pub(crate) struct VmWithRam {
        // Dropped in this order.
        vm: VmFd,
        ram: Arc<GuestRam>,
    }

    impl VmWithRam {
        /// Gives `ram` to a VM that has no memory yet.
        pub(crate) fn new(vm: VmFd, ram: Arc<GuestRam>) -> Result<VmWithRam, MemoryError> {
            let both = VmWithRam { vm, ram };
            // SAFETY: the memory is kept, and dropped after the VM. vCPUs are kept next to this, and dropped before
            // it. There are no references into guest memory: `vm-memory` hands out none.
            unsafe { both.ram.set_slots(&both.vm) }?;
            Ok(both)
        }

        pub(crate) fn vm(&self) -> &VmFd {
            &self.vm
        }

        pub(crate) fn ram(&self) -> &Arc<GuestRam> {
            &self.ram
        }
    }
}
