//! KVM as other kernels and processors have it: this program's `ioctl`, which passes on to the real one what it does not
//! answer itself.

#![expect(unsafe_code, reason = "stands in for the C library's function, and looks at what the kernel would")]

use std::collections::HashMap;

use kvm_bindings::{KVM_CAP_XSAVE2, KVM_VCPU_TSC_CTRL, kvm_device_attr, kvm_msr_entry};
use parking_lot::{Mutex, MutexGuard};

// linux/kvm.h.
pub(crate) const CHECK_EXTENSION: u64 = 0xae03;
pub(crate) const CREATE_VCPU: u64 = 0xae41;
pub(crate) const RUN: u64 = 0xae80;
pub(crate) const GET_MSRS: u64 = 0xc008_ae88;
pub(crate) const SET_MSRS: u64 = 0x4008_ae89;
pub(crate) const GET_LAPIC: u64 = 0x8400_ae8e;
pub(crate) const SET_XSAVE: u64 = 0x5000_aea5;
pub(crate) const GET_XSAVE: u64 = 0x9000_aea4;
pub(crate) const KVMCLOCK_CTRL: u64 = 0xaead;
pub(crate) const GET_XSAVE2: u64 = 0x9000_aecf;
pub(crate) const SET_DEVICE_ATTR: u64 = 0x4018_aee1;
pub(crate) const GET_DEVICE_ATTR: u64 = 0x4018_aee2;

const TSC: u32 = 0x10;
const DEBUGCTL: u32 = 0x1d9;
pub(crate) const ASYNC_PF_EN: u32 = 0x4b56_4d02;
const CLASSIC: usize = 4096;

/// How the time stamp counters can be set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tsc {
    /// As the real KVM does it.
    #[default]
    Real,
    /// As Linux from 5.16 on: by offset.
    Offsets,
    /// As Linux before: by the register, unless that is within a second of what it would have (`kvm_synchronize_tsc`).
    Register,
}

/// A call: descriptor, number, and which MSRs it has written.
pub(crate) type Call = (i32, u64, Vec<(u32, u64)>);

/// What is answered, and what was asked.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) tsc: Tsc,
    /// The offset of each vCPU's counter, by its descriptor.
    pub(crate) offsets: HashMap<i32, u64>,
    /// What was written to a counter last, when, and the offset that it has with that: the VM's generation.
    pub(crate) last: Option<(u64, u64, u64)>,
    /// How many ticks a second has.
    pub(crate) hz: u64,
    /// How many bytes of extended state there are.
    pub(crate) xsave: Option<usize>,
    /// Those beyond the classic ones.
    pub(crate) tail: Vec<u8>,
    /// `IA32_DEBUGCTL` is kept.
    pub(crate) keeps_debugctl: bool,
    pub(crate) debugctl: HashMap<i32, u64>,
    /// What was called.
    pub(crate) log: Vec<Call>,
}

static MODEL: Mutex<Option<Model>> = Mutex::new(None);
static TURN: Mutex<()> = Mutex::new(());

/// While it lives, KVM is as the model says. One test at a time.
pub(crate) struct Turn {
    _turn: MutexGuard<'static, ()>,
}

impl Turn {
    pub(crate) fn new(model: Model) -> Turn {
        let turn = TURN.lock();
        *MODEL.lock() = Some(model);
        Turn { _turn: turn }
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut Model) -> T) -> T {
        look(MODEL.lock().as_mut().unwrap())
    }

    /// What was asked since.
    pub(crate) fn log(&self) -> Vec<Call> {
        self.with(|model| std::mem::take(&mut model.log))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *MODEL.lock() = None;
    }
}

/// The host's counter.
pub(crate) fn now() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn real(fd: i32, request: u64, argument: usize) -> i32 {
    // SAFETY: exactly what the caller asked for.
    let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
    i32::try_from(result).unwrap()
}

/// The entries of a `struct kvm_msrs`.
fn entries<'a>(argument: usize) -> &'a mut [kvm_msr_entry] {
    let header: *mut u32 = std::ptr::with_exposed_provenance_mut(argument);
    // SAFETY: what the caller hands to the kernel as such a structure: a count, 4 bytes, and the entries.
    let count = unsafe { header.read() };
    // SAFETY: the same.
    unsafe { std::slice::from_raw_parts_mut(header.wrapping_add(2).cast(), count as usize) }
}

/// The bytes that the kernel would read or write, which must be there: `argument` is the beginning of an allocation.
fn bytes<'a>(argument: usize, len: usize) -> &'a mut [u8] {
    let start: *mut u8 = std::ptr::with_exposed_provenance_mut(argument);
    // SAFETY: the caller got it from the allocator, whose function this is.
    let has = unsafe { libc::malloc_usable_size(start.cast()) };
    assert!(has >= len, "KVM would read or write {len} bytes of a buffer of {has}");
    // SAFETY: there are as many, and the caller lends them for the call.
    unsafe { std::slice::from_raw_parts_mut(start, len) }
}

impl Model {
    fn write_tsc(&mut self, fd: i32, value: u64) {
        let at = now();
        let expected = self.last.map(|(written, then, _)| written.wrapping_add(at.wrapping_sub(then)));
        let offset = match (expected, self.last) {
            (Some(expected), Some((.., offset))) if value.abs_diff(expected) < self.hz => offset,
            _ => value.wrapping_sub(at),
        };
        self.last = Some((value, at, offset));
        self.offsets.insert(fd, offset);
    }

    fn offset(&self, fd: i32) -> u64 {
        self.offsets.get(&fd).copied().unwrap_or(0)
    }

    /// Answers the call itself, if that differs from what the real KVM does.
    fn answer(&mut self, fd: i32, request: u64, argument: usize) -> Option<i32> {
        match request {
            CHECK_EXTENSION if argument == KVM_CAP_XSAVE2 as usize => self.xsave.map(|len| i32::try_from(len).unwrap()),
            GET_XSAVE2 => {
                let buffer = bytes(argument, self.xsave?);
                let result = real(fd, GET_XSAVE, argument);
                self.tail.resize(buffer.len() - CLASSIC, 0);
                buffer[CLASSIC..].copy_from_slice(&self.tail);
                Some(result)
            }
            SET_XSAVE => {
                self.tail = bytes(argument, self.xsave?)[CLASSIC..].to_vec();
                None
            }
            GET_DEVICE_ATTR | SET_DEVICE_ATTR if self.tsc != Tsc::Real => {
                let attribute: *const kvm_device_attr = std::ptr::with_exposed_provenance(argument);
                // SAFETY: what the caller hands to the kernel as such a structure.
                let attribute = unsafe { attribute.read() };
                if attribute.group != KVM_VCPU_TSC_CTRL {
                    return None;
                }
                let value: *mut u64 = std::ptr::with_exposed_provenance_mut(usize::try_from(attribute.addr).unwrap());
                match (self.tsc, request) {
                    (Tsc::Register, _) => {
                        nix::errno::Errno::ENXIO.set();
                        return Some(-1);
                    }
                    // SAFETY: the kernel would do the same with it.
                    (_, GET_DEVICE_ATTR) => unsafe { value.write(self.offset(fd)) },
                    // SAFETY: the same.
                    _ => drop(self.offsets.insert(fd, unsafe { value.read() })),
                }
                Some(0)
            }
            _ => None,
        }
    }

    /// What the real KVM has done is made to look as this one would have done it.
    fn correct(&mut self, fd: i32, request: u64, argument: usize, result: i32) {
        match request {
            CREATE_VCPU if result >= 0 => {
                self.debugctl.remove(&result);
                // It begins at zero.
                self.offsets.insert(result, now().wrapping_neg());
                self.last = Some((0, now(), now().wrapping_neg()));
            }
            GET_MSRS if result > 0 => {
                for entry in &mut entries(argument)[..usize::try_from(result).unwrap()] {
                    match entry.index {
                        TSC if self.tsc != Tsc::Real => entry.data = now().wrapping_add(self.offset(fd)),
                        DEBUGCTL => entry.data = self.debugctl.get(&fd).copied().unwrap_or(0),
                        _ => {}
                    }
                }
            }
            SET_MSRS if result > 0 => {
                let written = &entries(argument)[..usize::try_from(result).unwrap()];
                self.log.push((fd, request, written.iter().map(|entry| (entry.index, entry.data)).collect()));
                for entry in written {
                    match entry.index {
                        TSC if self.tsc == Tsc::Register => self.write_tsc(fd, entry.data),
                        DEBUGCTL if self.keeps_debugctl => drop(self.debugctl.insert(fd, entry.data)),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}

/// In place of the C library's, for all of this program.
#[unsafe(no_mangle)]
extern "C" fn ioctl(fd: i32, request: u64, argument: usize) -> i32 {
    let kvm = request >> 8 & 0xff == 0xae;
    if !kvm {
        return real(fd, request, argument);
    }
    if let Some(model) = MODEL.lock().as_mut() {
        model.log.push((fd, request, Vec::new()));
        if let Some(result) = model.answer(fd, request, argument) {
            return result;
        }
    }
    // Not locked: it may take long.
    let result = real(fd, request, argument);
    if let Some(model) = MODEL.lock().as_mut() {
        model.correct(fd, request, argument, result);
    }
    result
}
