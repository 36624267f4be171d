//! What neither `kvm-ioctls` nor `nix` wraps: some KVM calls, and signals taken without a handler.
//!
//! Numbers and layouts: linux/kvm.h and asm/kvm.h; checked below against the structures of `kvm-bindings`.
#![expect(unsafe_code, reason = "raw ioctls and signal calls, each checked by the kernel")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_API_VERSION, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_irqchip, kvm_sregs2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::sched::{sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use page_units::{ByteLen, GuestAddr, HostAddr};

const KVMIO: u8 = 0xae;
/// The length of the classic extended state, in 4-byte words.
pub(crate) const XSAVE_WORDS: usize = 1024;
const _: () = assert!(KVM_API_VERSION == 12);
const _: () = assert!(size_of::<kvm_sregs2>() == 320 && size_of::<kvm_device_attr>() == 24);

/// `struct kvm_signal_mask` with the 64-bit signal set of the kernel behind it.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; 8],
}
const _: () = assert!(size_of::<SignalMask>() == 12);

nix::ioctl_none!(kvm_get_tsc_khz, KVMIO, 0xa3);
nix::ioctl_read!(kvm_get_sregs2, KVMIO, 0xcc, kvm_sregs2);
nix::ioctl_write_ptr!(kvm_set_sregs2, KVMIO, 0xcd, kvm_sregs2);
// Their numbers hold the size of the classic structure, 4096 bytes.
nix::ioctl_read!(kvm_get_xsave2, KVMIO, 0xcf, [u32; XSAVE_WORDS]);
nix::ioctl_write_ptr!(kvm_set_xsave, KVMIO, 0xa5, [u32; XSAVE_WORDS]);
nix::ioctl_write_ptr!(kvm_get_device_attr, KVMIO, 0xe2, kvm_device_attr);
nix::ioctl_write_ptr!(kvm_set_device_attr, KVMIO, 0xe1, kvm_device_attr);
// The size that the number holds is that of the structure without its set.
nix::ioctl_write_ptr_bad!(kvm_set_signal_mask, nix::request_code_write!(KVMIO, 0x8b, 4), SignalMask);

/// The same KVM, for another thread.
pub(crate) fn same_kvm(kvm: &Kvm) -> io::Result<Kvm> {
    // SAFETY: `kvm` has it open.
    let fd = unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) }.try_clone_to_owned()?;
    // SAFETY: a descriptor of KVM, which is nobody else's.
    Ok(unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) })
}

/// Makes `len` bytes at `host` the guest's memory at `guest`. The caller keeps them mapped while the VM lives.
pub(crate) fn set_slot(vm: &VmFd, slot: u32, guest: GuestAddr, host: HostAddr, len: ByteLen) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: guest.0,
        memory_size: len.0,
        userspace_addr: host.0,
    };
    // SAFETY: the range belongs to a `GuestRam`, which its `Machine` keeps; the public function says so to others.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

/// Gives a range back: `MADV_DONTNEED` drops private pages, `MADV_REMOVE` punches the file behind shared ones.
pub(crate) fn give_back(start: HostAddr, length: ByteLen, shared: bool) -> io::Result<()> {
    let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
    let at: *mut libc::c_void = std::ptr::with_exposed_provenance_mut(usize::try_from(start.0).unwrap_or(0));
    // SAFETY: a range of guest memory (the caller has looked), to which there are no Rust references: `vm-memory` hands
    // out none.
    match unsafe { libc::madvise(at, length.get(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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

/// The extended state (`struct kvm_xsave`). `len` is what `KVM_CAP_XSAVE2` says, 0 where it is not known.
pub(crate) fn get_xsave(vcpu: &VcpuFd, len: usize) -> io::Result<Vec<u32>> {
    if len == 0 {
        return Ok(vcpu.get_xsave()?.region.to_vec());
    }
    let mut words = vec![0; len.div_ceil(4).max(XSAVE_WORDS)];
    // SAFETY: the kernel writes as many bytes as the capability says.
    unsafe { kvm_get_xsave2(vcpu.as_raw_fd(), words.as_mut_ptr().cast()) }?;
    Ok(words)
}

/// Sets it. `words` must be at least as many as [`get_xsave`] gives.
pub(crate) fn set_xsave(vcpu: &VcpuFd, len: usize, words: &[u32]) -> io::Result<()> {
    if words.len() < XSAVE_WORDS || words.len() < len.div_ceil(4) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the kernel reads as many bytes as the capability says, or 4096 without it: not more than there are.
    unsafe { kvm_set_xsave(vcpu.as_raw_fd(), words.as_ptr().cast()) }?;
    Ok(())
}

fn tsc_offset_attr(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value.addr() as u64,
        flags: 0,
    }
}

/// How far the guest's time stamp counter is ahead of the host's. Linux Documentation/virt/kvm/devices/vcpu.rst.
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut value = 0u64;
    let attr = tsc_offset_attr(&raw mut value);
    // SAFETY: the kernel writes 8 bytes to `value`, whose address was exposed by `addr` of a raw pointer.
    unsafe { kvm_get_device_attr(vcpu.as_raw_fd(), &raw const attr) }?;
    Ok(std::hint::black_box(value))
}

pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> io::Result<()> {
    let attr = tsc_offset_attr(&raw mut value);
    std::hint::black_box(&value);
    // SAFETY: the kernel reads 8 bytes from `value`.
    unsafe { kvm_set_device_attr(vcpu.as_raw_fd(), &raw const attr) }?;
    Ok(())
}

/// A set of signals.
#[derive(Clone, Copy)]
pub(crate) struct Signals(libc::sigset_t);

impl Signals {
    pub(crate) fn of(signals: &[i32]) -> Signals {
        let mut set = MaybeUninit::uninit();
        // SAFETY: the call initialises the set.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: initialised just now.
        let mut set = unsafe { set.assume_init() };
        for &signal in signals {
            // SAFETY: an initialised set; a bad number is refused.
            unsafe { libc::sigaddset(&raw mut set, signal) };
        }
        Signals(set)
    }

    /// Blocks them in this thread, and returns what was blocked before.
    pub(crate) fn block(&self) -> io::Result<Signals> {
        let mut old = Signals::of(&[]);
        // SAFETY: both sets are initialised.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const self.0, &raw mut old.0) };
        if error == 0 { Ok(old) } else { Err(io::Error::from_raw_os_error(error)) }
    }

    /// Takes one of them, if one is pending for this thread. With it comes the address of the fault, if it has one.
    pub(crate) fn take(&self) -> Option<(i32, HostAddr)> {
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: set and time are initialised, and the kernel writes one siginfo.
        let signal = unsafe { libc::sigtimedwait(&raw const self.0, info.as_mut_ptr(), &raw const now) };
        if signal < 0 {
            return None;
        }
        // SAFETY: zeroed, and then written by the kernel.
        let info = unsafe { info.assume_init() };
        // SAFETY: for signals that have no address these bytes are something else, which the caller does not use.
        let address = unsafe { info.si_addr() };
        Some((signal, HostAddr(address.addr() as u64)))
    }
}

/// While the vCPU is in `KVM_RUN`, `blocked` less `let_in` is blocked in its thread.
pub(crate) fn set_signal_mask(vcpu: &VcpuFd, blocked: &Signals, let_in: &[i32]) -> io::Result<()> {
    let mut bits = 0u64;
    for signal in 1..=64 {
        // SAFETY: an initialised set.
        let member = unsafe { libc::sigismember(&raw const blocked.0, signal) } == 1;
        if member && !let_in.contains(&signal) {
            bits |= 1 << (signal - 1);
        }
    }
    // This crate is for x86-64, whose signal sets are little-endian words.
    let mask = SignalMask { len: 8, set: bits.to_le_bytes() };
    // SAFETY: the kernel reads the header and `len` bytes behind it.
    unsafe { kvm_set_signal_mask(vcpu.as_raw_fd(), &raw const mask) }?;
    Ok(())
}

fn only(core: usize) -> Option<libc::cpu_set_t> {
    // SAFETY: a set of bits, of which none is set.
    let mut set: libc::cpu_set_t = unsafe { MaybeUninit::zeroed().assume_init() };
    if core >= 8 * size_of_val(&set) {
        return None;
    }
    // SAFETY: the set has such a bit.
    unsafe { libc::CPU_SET(core, &mut set) };
    Some(set)
}

/// Moves another thread to a core. One that has not run yet begins there, instead of waiting for its maker's core
/// first, which costs a new thread more than all else.
pub(crate) fn move_to(thread: &JoinHandle<()>, core: usize) {
    let Some(set) = only(core) else { return };
    // SAFETY: the thread was not joined yet; the kernel reads the set.
    let error = unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of_val(&set), &raw const set) };
    if error != 0 {
        // The thread tries for itself, and says what is wrong.
        log::debug!("moving a thread to core {core}: {}", io::Error::from_raw_os_error(error));
    }
}

/// Moves `thread`, the calling one or one that waits for its core, to another core where it may run. It is not bound to
/// anything by that, and nothing depends on whether it succeeds.
pub(crate) fn push_off(thread: Pid, core: usize) {
    let Ok(allowed) = sched_getaffinity(thread) else { return };
    let mut others = allowed;
    // With nowhere else to go the kernel refuses.
    if others.unset(core).is_ok() && sched_setaffinity(thread, &others).is_ok() {
        let back = sched_setaffinity(thread, &allowed);
        log::trace!("thread {thread} was moved off core {core}: {back:?}");
    }
}

/// Sends `signal` to the thread of this process, which exists and has it blocked.
pub(crate) fn kick(thread: i32, signal: i32) {
    let process = nix::unistd::getpid().as_raw();
    // SAFETY: only numbers are passed, and a signal is taken by its thread with `sigtimedwait`.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}

/// Whether the byte of this process at `address` can be read, asked of the kernel: no signal when it can't.
pub(crate) fn readable(address: HostAddr) -> bool {
    read_memory(address, &mut [0]).is_ok()
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

/// What KVM says of a `KVM_EXIT_INTERNAL_ERROR`.
pub(crate) fn internal_suberror(vcpu: &mut VcpuFd) -> u32 {
    // SAFETY: any bytes are a valid number; for another exit they mean something else.
    unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
}

/// Copies memory of this process through the kernel: what can't be read is an error and not a signal.
pub(crate) fn read_memory(from: HostAddr, to: &mut [u8]) -> io::Result<()> {
    let myself = nix::unistd::getpid().as_raw();
    let mut done = 0;
    while done < to.len() {
        let rest = &mut to[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let address = usize::try_from(from.0).map_err(io::Error::other)? + done;
        let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: rest.len() };
        // SAFETY: the kernel checks both ranges, and writes to `rest` alone.
        let read = unsafe { libc::process_vm_readv(myself, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(read) {
            Err(_) => return Err(io::Error::last_os_error()),
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(read) => done += read,
        }
    }
    Ok(())
}

/// Copies `len` bytes at `from`, wherever they are (a mapped file, too), to memory of this process through the kernel.
pub(crate) fn write_memory(from: *const u8, to: HostAddr, len: ByteLen) -> io::Result<()> {
    let myself = nix::unistd::getpid().as_raw();
    let len = len.get();
    let mut done = 0;
    while done < len {
        let local = libc::iovec { iov_base: from.wrapping_add(done).cast_mut().cast(), iov_len: len - done };
        let address = usize::try_from(to.0).map_err(io::Error::other)? + done;
        let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: len - done };
        // SAFETY: the kernel checks both ranges. It writes to guest memory, to which there are no references: all of
        // Rust looks at it through volatile accesses.
        let written = unsafe { libc::process_vm_writev(myself, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(written) {
            Err(_) => return Err(io::Error::last_os_error()),
            Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            Ok(written) => done += written,
        }
    }
    Ok(())
}
