//! KVM calls that `kvm-ioctls` does not wrap.
//!
//! Numbers and layouts: linux/kvm.h and asm/kvm.h; checked below against the structures of `kvm-bindings`.
#![expect(unsafe_code, reason = "raw ioctls, each checked by the kernel")]

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_XSAVE2, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_irqchip, kvm_sregs2,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::borrow::Cow;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

const KVMIO: u8 = 0xae;
/// The length of the classic extended state, in 4-byte words.
pub(crate) const XSAVE_WORDS: usize = 1024;
const _: () = assert!(KVM_API_VERSION == 12);
const _: () = assert!(size_of::<kvm_sregs2>() == 320 && size_of::<kvm_device_attr>() == 24);

nix::ioctl_none!(kvm_get_tsc_khz, KVMIO, 0xa3);
nix::ioctl_read!(kvm_get_sregs2, KVMIO, 0xcc, kvm_sregs2);
nix::ioctl_write_ptr!(kvm_set_sregs2, KVMIO, 0xcd, kvm_sregs2);
// Their numbers hold the size of the classic structure, 4096 bytes.
nix::ioctl_read!(kvm_get_xsave2, KVMIO, 0xcf, [u32; XSAVE_WORDS]);
nix::ioctl_write_ptr!(kvm_set_xsave, KVMIO, 0xa5, [u32; XSAVE_WORDS]);
nix::ioctl_write_ptr!(kvm_get_device_attr, KVMIO, 0xe2, kvm_device_attr);
nix::ioctl_write_ptr!(kvm_set_device_attr, KVMIO, 0xe1, kvm_device_attr);

/// The same KVM, for another thread.
pub(crate) fn same_kvm(kvm: &Kvm) -> io::Result<Kvm> {
    // SAFETY: `kvm` has it open.
    let fd = unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) }.try_clone_to_owned()?;
    // SAFETY: a descriptor of KVM that was duplicated just now.
    Ok(unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) })
}

pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one such structure.
    unsafe { kvm_get_sregs2(vcpu.as_raw_fd(), &raw mut sregs) }?;
    Ok(sregs)
}

pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads one such structure.
    unsafe { kvm_set_sregs2(vcpu.as_raw_fd(), sregs) }?;
    Ok(())
}

/// The frequency of the time stamp counters of vCPUs that will be created. Linux Documentation/virt/kvm/api.rst, 4.56.
pub(crate) fn get_vm_tsc_khz(vm: &VmFd) -> Option<u32> {
    // SAFETY: the call takes no argument, and returns the number.
    let khz = unsafe { kvm_get_tsc_khz(vm.as_raw_fd()) }.ok()?;
    u32::try_from(khz).ok().filter(|khz| *khz > 0)
}

/// How many bytes of extended state `KVM_GET_XSAVE2` writes and `KVM_SET_XSAVE` reads at most, 0 where there are only the
/// classic 4096. What the process has asked for (`ARCH_REQ_XCOMP_GUEST_PERM`: AMX) makes it more, so the answer holds only
/// for the call that follows. Linux Documentation/virt/kvm/api.rst, 4.134.
pub(crate) fn xsave_len(kvm: &Kvm) -> usize {
    usize::try_from(kvm.check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(0)
}

/// The extended state (`struct kvm_xsave`), in 4-byte words.
pub(crate) fn get_xsave(kvm: &Kvm, vcpu: &VcpuFd) -> io::Result<Vec<u32>> {
    let len = xsave_len(kvm);
    if len == 0 {
        return Ok(vcpu.get_xsave()?.region.to_vec());
    }
    let mut words = vec![0; len.div_ceil(4).max(XSAVE_WORDS)];
    // SAFETY: the kernel writes at most as many bytes as the capability says now: a process has its permissions for good,
    // and cannot get more of them once there is a vCPU.
    unsafe { kvm_get_xsave2(vcpu.as_raw_fd(), words.as_mut_ptr().cast()) }?;
    Ok(words)
}

/// Sets it. Words that KVM reads and that are not given are zero.
pub(crate) fn set_xsave(kvm: &Kvm, vcpu: &VcpuFd, words: &[u32]) -> io::Result<()> {
    let mut words = Cow::Borrowed(words);
    let read = xsave_len(kvm).div_ceil(4).max(XSAVE_WORDS);
    if words.len() < read {
        words.to_mut().resize(read, 0);
    }
    // SAFETY: the kernel reads at most as many bytes as the capability says now (see above), or 4096 without it: not more
    // than there are.
    unsafe { kvm_set_xsave(vcpu.as_raw_fd(), words.as_ptr().cast()) }?;
    Ok(())
}

fn tsc_offset_attr(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.expose_provenance() as u64,
        flags: 0,
    }
}

/// How far the guest's time stamp counter is ahead of the host's. Linux Documentation/virt/kvm/devices/vcpu.rst.
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let attr = tsc_offset_attr(&raw mut value);
    // SAFETY: the kernel writes 8 bytes to `value`, whose address was exposed.
    unsafe { kvm_get_device_attr(vcpu.as_raw_fd(), &raw const attr) }?;
    Ok(value)
}

pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&raw mut value);
    // SAFETY: the kernel reads 8 bytes from `value`.
    unsafe { kvm_set_device_attr(vcpu.as_raw_fd(), &raw const attr) }?;
    Ok(())
}

/// The state inside `struct kvm_irqchip`, whichever chip it is.
pub(crate) fn chip_bytes(chip: &kvm_irqchip) -> &[u8; 512] {
    // SAFETY: all members of the union are plain bytes and numbers; `dummy` covers it whole.
    let bytes = unsafe { &chip.chip.dummy };
    let bytes: *const [std::ffi::c_char; 512] = bytes;
    // SAFETY: bytes of the same size and alignment, borrowed from `chip`.
    unsafe { &*bytes.cast::<[u8; 512]>() }
}

/// The reverse.
pub(crate) fn chip_of(chip_id: u32, bytes: &[u8; 512]) -> kvm_irqchip {
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    chip.chip.dummy = bytes.map(|byte| byte.cast_signed());
    chip
}
