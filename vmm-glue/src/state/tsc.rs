//! Time stamp counters: put back exactly, and in step.

use kvm_ioctls::VcpuFd;

use super::error::Call;
use super::{StateError, VcpuState, msrs};
use crate::sys;

/// How the time stamp counters of a guest are put back. What KVM does is found out by trying, once per
/// [`Host`](super::Host).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TscMethod {
    /// By `KVM_VCPU_TSC_OFFSET` (Linux 5.16, Documentation/virt/kvm/devices/vcpu.rst, 4.1): exactly, and all vCPUs of one
    /// offset keep one offset.
    Offset,
    /// By writing the register `IA32_TSC`, which older kernels take exactly only for the first vCPU; others whose counters
    /// were less than a second apart get into step with it.
    Register,
    /// Not at all: this KVM answers that it has done so, and the guest's counters go on being the host's.
    Ignored,
}

/// Further away than KVM takes for an attempt to bring two counters into step, which it does not do by the value that was
/// written: a second (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c). About two minutes of the fastest processors.
const FAR: u64 = 1 << 40;

/// Finds out how, on a vCPU that is used for nothing else.
pub(super) fn method(vcpu: &VcpuFd) -> Result<TscMethod, StateError> {
    if let Ok(offset) = sys::get_tsc_offset(vcpu) {
        let moved = offset.wrapping_add(FAR);
        if sys::set_tsc_offset(vcpu, moved).is_ok() && sys::get_tsc_offset(vcpu).is_ok_and(|now| now == moved) {
            return Ok(TscMethod::Offset);
        }
    }
    let before = counter(vcpu, 0)?;
    msrs::set(vcpu, 0, [(msrs::TSC, before.wrapping_add(FAR))].into_iter())?;
    let moved = counter(vcpu, 0)?.wrapping_sub(before) >= FAR;
    Ok(if moved { TscMethod::Register } else { TscMethod::Ignored })
}

fn counter(vcpu: &VcpuFd, id: u32) -> Result<u64, StateError> {
    let found = msrs::get(vcpu, id, &[msrs::TSC])?;
    found.first().map(|&(_, value)| value).ok_or_else(|| StateError::Unsupported("MSR 0x10 (IA32_TSC)".into()))
}

/// The counters of a machine's vCPUs, which are put back one after the other.
#[derive(Debug)]
pub(super) struct Counters {
    method: TscMethod,
    first: Option<First>,
}

/// What the others are compared with.
#[derive(Clone, Copy, Debug)]
struct First {
    /// What was saved of it.
    value: u64,
    offset: Option<u64>,
    /// The offset that it has now.
    has: u64,
}

impl Counters {
    pub(super) fn new(method: TscMethod) -> Counters {
        Counters { method, first: None }
    }

    /// Puts the counter of the next vCPU back, `ahead` ticks ahead of where it was. Returns what is to be written to its
    /// registers for that, in this order; nothing else is to be written to `IA32_TSC`.
    pub(super) fn put(&mut self, vcpu: &VcpuFd, state: &VcpuState, ahead: u64) -> Result<Vec<(u32, u64)>, StateError> {
        let Some(value) = state.msr(msrs::TSC) else { return Ok(Vec::new()) };
        let wanted = value.wrapping_add(ahead);
        match self.method {
            TscMethod::Ignored => Ok(vec![(msrs::TSC, wanted)]),
            TscMethod::Register if self.first.is_none() => {
                self.first = Some(First { value, offset: state.tsc_offset, has: 0 });
                Ok(vec![(msrs::TSC, wanted.wrapping_add(FAR)), (msrs::TSC, wanted)])
            }
            TscMethod::Register => Ok(vec![(msrs::TSC, wanted)]),
            TscMethod::Offset => {
                let offset = match self.first.and_then(|first| first.beside(state, value)) {
                    Some(offset) => offset,
                    None => exactly(vcpu, state.id, wanted)?,
                };
                sys::set_tsc_offset(vcpu, offset).call("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", state.id)?;
                self.first.get_or_insert(First { value, offset: state.tsc_offset, has: offset });
                Ok(Vec::new())
            }
        }
    }
}

/// The offset with which a counter has this value now.
fn exactly(vcpu: &VcpuFd, id: u32, wanted: u64) -> Result<u64, StateError> {
    let offset = sys::get_tsc_offset(vcpu).call("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)", id)?;
    Ok(offset.wrapping_add(wanted.wrapping_sub(counter(vcpu, id)?)))
}

impl First {
    /// The offset of another vCPU's counter, as far from this one's as it was.
    fn beside(&self, state: &VcpuState, value: u64) -> Option<u64> {
        if let (Some(first), Some(offset)) = (self.offset, state.tsc_offset) {
            return Some(self.has.wrapping_add(offset.wrapping_sub(first)));
        }
        // Saved by a kernel that does not tell: less than a second apart they are in step, as KVM has it too.
        let second = u64::from(state.tsc_khz.unwrap_or(0)) * 1000;
        (value.abs_diff(self.value) < second).then_some(self.has)
    }
}
