//! `KVM_RUN` and signals.
#![expect(unsafe_code, reason = "raw ioctls, each checked by the kernel")]

use std::io;
use std::os::fd::AsRawFd;

use kvm_ioctls::VcpuFd;

use super::Signals;

const KVMIO: u8 = 0xae;

/// `struct kvm_signal_mask` with the 64-bit signal set of the kernel behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; 8],
}
const _: () = assert!(size_of::<SignalMask>() == 12);

// The size that the number holds is that of the structure without its set.
nix::ioctl_write_ptr_bad!(kvm_set_signal_mask, nix::request_code_write!(KVMIO, 0x8b, 4), SignalMask);

/// While the vCPU is in `KVM_RUN`, `blocked` less `let_in` is blocked in its thread.
pub(crate) fn set_signal_mask(vcpu: &VcpuFd, blocked: &Signals, let_in: &[i32]) -> io::Result<()> {
    let bits = blocked.bits() & !Signals::of(let_in).bits();
    // This crate is for x86-64, whose signal sets are little-endian words.
    let mask = SignalMask { len: 8, set: bits.to_le_bytes() };
    // SAFETY: the kernel reads the header and `len` bytes behind it.
    unsafe { kvm_set_signal_mask(vcpu.as_raw_fd(), &raw const mask) }?;
    Ok(())
}

/// What KVM says of a `KVM_EXIT_INTERNAL_ERROR`.
pub(crate) fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: any bytes are a valid number; for another exit they mean something else.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}
