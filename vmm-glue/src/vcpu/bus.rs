//! Where the guest's port and memory-mapped I/O goes.

/// What a vCPU does after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It goes on.
    Run,
    /// It stops, with the access completed, until [`Vcpus::resume`](crate::Vcpus::resume).
    Stop,
}

/// The devices of a machine. Called on the threads of the vCPUs, several at a time.
///
/// Nothing is called for an address inside RAM: an access there that KVM can't do is a
/// [`FailedPage`](crate::FailedPage).
pub trait Bus: Send + Sync + 'static {
    /// The guest writes `data` to a port.
    fn io_out(&self, vcpu: u32, port: u16, data: &[u8]) -> Next;

    /// The guest reads from a port. All ones if nothing is there.
    fn io_in(&self, vcpu: u32, port: u16, data: &mut [u8]) -> Next {
        let _ = (vcpu, port);
        data.fill(0xff);
        Next::Run
    }

    /// The guest writes to an address that is not RAM.
    fn mmio_write(&self, vcpu: u32, address: u64, data: &[u8]) -> Next {
        let _ = (vcpu, address, data);
        Next::Run
    }

    /// The guest reads from an address that is not RAM. All ones if nothing is there.
    fn mmio_read(&self, vcpu: u32, address: u64, data: &mut [u8]) -> Next {
        let _ = (vcpu, address);
        data.fill(0xff);
        Next::Run
    }
}
