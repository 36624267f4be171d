//! What time it is for a guest that is restored.

use std::time::{Duration, SystemTime};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};

use super::error::Call;
use super::{StateError, VmState};

/// Whether a guest learns that time has passed while it did not exist.
///
/// Its kvmclock and its time stamp counters move together, whichever is chosen. The wall clock is the guest's own affair:
/// Linux reads the host's once at its start, so a guest that [goes on](ClockPolicy::GoOn) lags behind by as long as it did
/// not exist until it asks somebody (NTP, `/dev/ptp0` of `ptp_kvm`, a guest agent).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ClockPolicy {
    /// Time goes on where it stood still: no timer of the guest is late.
    #[default]
    GoOn,
    /// Time is what it would be if the guest had run on: its wall clock is right if the clocks of both hosts are, and
    /// timers that would have expired do so at once. Linux guests may report that they were stopped for long.
    CatchUp,
}

/// The guest's clock and the host's, at one time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clocks {
    /// kvmclock in nanoseconds.
    pub(super) clock: u64,
    /// `CLOCK_REALTIME` in nanoseconds since 1970.
    pub(super) realtime: Option<u64>,
}

fn since_1970() -> Option<u64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    u64::try_from(since.as_nanos()).ok()
}

/// Reads both, if there is a kvmclock. KVM tells both at once from Linux 5.16 on, where the host's counter is stable
/// (Documentation/virt/kvm/api.rst, 4.29).
pub(super) fn get(vm: &VmFd) -> Result<Option<Clocks>, StateError> {
    if !vm.check_extension(Cap::AdjustClock) {
        return Ok(None);
    }
    let data = vm.get_clock().call("KVM_GET_CLOCK", None)?;
    let told = data.flags & KVM_CLOCK_REALTIME != 0;
    Ok(Some(Clocks { clock: data.clock, realtime: if told { Some(data.realtime) } else { since_1970() } }))
}

pub(super) fn set(vm: &VmFd, clock: u64) -> Result<(), StateError> {
    vm.set_clock(&kvm_clock_data { clock, ..kvm_clock_data::default() }).call("KVM_SET_CLOCK", None)
}

/// How a guest's clocks go on.
#[derive(Debug)]
pub(super) struct Passing {
    /// kvmclock when it was saved, if it goes on from what it is now instead.
    caught_up_from: Option<u64>,
}

impl Passing {
    /// Sets kvmclock. It has to be right before the registers are: KVM computes the wall clock of the guest from it.
    pub(super) fn begin(state: &VmState, vm: &VmFd, policy: ClockPolicy) -> Result<Passing, StateError> {
        let Some(clock) = state.clock else { return Ok(Passing { caught_up_from: None }) };
        if policy == ClockPolicy::GoOn {
            set(vm, clock)?;
            return Ok(Passing { caught_up_from: None });
        }
        let realtime = state.realtime.ok_or_else(|| {
            StateError::Unsupported(
                "the time at which the snapshot was taken, which a clock that catches up needs".into(),
            )
        })?;
        let takes = u32::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        if takes & KVM_CLOCK_REALTIME != 0 {
            let data = kvm_clock_data { clock, flags: KVM_CLOCK_REALTIME, realtime, ..kvm_clock_data::default() };
            vm.set_clock(&data).call("KVM_SET_CLOCK", None)?;
        } else {
            // Never backwards, as KVM has it.
            set(vm, clock.saturating_add(since_1970().unwrap_or(0).saturating_sub(realtime)))?;
        }
        Ok(Passing { caught_up_from: Some(clock) })
    }

    /// How much further than in the snapshot a time stamp counter of this frequency has to be now.
    pub(super) fn ahead(&self, vm: &VmFd, khz: Option<u32>) -> Result<u64, StateError> {
        let passed = self.passed(vm)?;
        let ticks = passed.as_nanos() * u128::from(khz.unwrap_or(0)) / 1_000_000;
        Ok(u64::try_from(ticks).unwrap_or(u64::MAX))
    }

    /// How much further kvmclock is than in the snapshot, if it has to be.
    pub(super) fn passed(&self, vm: &VmFd) -> Result<Duration, StateError> {
        let Some(from) = self.caught_up_from else { return Ok(Duration::ZERO) };
        let now = vm.get_clock().call("KVM_GET_CLOCK", None)?.clock;
        Ok(Duration::from_nanos(now.saturating_sub(from)))
    }

    /// The guest is about to run: a clock that goes on has stood still until now.
    pub(super) fn end(&self, state: &VmState, vm: &VmFd) -> Result<(), StateError> {
        match (state.clock, self.caught_up_from) {
            (Some(clock), None) => set(vm, clock),
            _ => Ok(()),
        }
    }
}
