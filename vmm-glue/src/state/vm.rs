//! What belongs to the VM and to no vCPU: interrupt controllers, timer, clock.

use std::time::Duration;

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2};
use kvm_ioctls::{VcpuFd, VmFd};

use super::clock::{self, Passing};
use super::created::Created;
use super::error::Call;
use super::tsc::Counters;
use super::{ClockPolicy, Host, MachineState, StateError, TscMethod, VcpuState};

/// The chips of a VM whose interrupt controllers are in the kernel. The bytes are `union { ... } chip` of
/// `struct kvm_irqchip`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupts {
    /// The first 8259.
    pub pic_master: Vec<u8>,
    /// The second 8259.
    pub pic_slave: Vec<u8>,
    /// The I/O APIC.
    pub ioapic: Vec<u8>,
}

/// The state of a VM, without memory and vCPUs.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct VmState {
    /// The interrupt controllers, if they are in the kernel.
    pub interrupts: Option<Interrupts>,
    /// The 8254 timer, if it is in the kernel.
    pub pit: Option<kvm_pit_state2>,
    /// The guest's kvmclock in nanoseconds, if KVM has one.
    pub clock: Option<u64>,
    /// The host's time then, in nanoseconds since 1970 (UTC).
    pub realtime: Option<u64>,
}

/// How time goes on in a machine that was restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// How the time stamp counters were put back.
    pub tsc: TscMethod,
    /// How much time the guest's clocks have caught up.
    pub caught_up: Duration,
}

/// How many bytes the union of `struct kvm_irqchip` has.
pub(super) const CHIP: usize = 512;

fn get_chip(vm: &VmFd, chip_id: u32) -> Result<Vec<u8>, StateError> {
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    vm.get_irqchip(&mut chip).call("KVM_GET_IRQCHIP", None)?;
    Ok(crate::sys::chip_bytes(&chip).to_vec())
}

fn set_chip(vm: &VmFd, chip_id: u32, bytes: &[u8]) -> Result<(), StateError> {
    let bytes = bytes.try_into().map_err(|_| {
        StateError::Invalid(format!("interrupt controller {chip_id} of {} bytes instead of {CHIP}", bytes.len()))
    })?;
    vm.set_irqchip(&crate::sys::chip_of(chip_id, bytes)).call("KVM_SET_IRQCHIP", None)
}

impl VmState {
    /// Takes the state of a VM whose vCPUs are stopped.
    ///
    /// # Errors
    /// If KVM refuses a call.
    pub fn save(vm: &VmFd, irqchip: bool, pit: bool) -> Result<VmState, StateError> {
        let interrupts = if irqchip {
            Some(Interrupts {
                pic_master: get_chip(vm, KVM_IRQCHIP_PIC_MASTER)?,
                pic_slave: get_chip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
                ioapic: get_chip(vm, KVM_IRQCHIP_IOAPIC)?,
            })
        } else {
            None
        };
        let pit = if pit { Some(vm.get_pit2().call("KVM_GET_PIT2", None)?) } else { None };
        let clocks = clock::get(vm)?;
        let (clock, realtime) = (clocks.map(|both| both.clock), clocks.and_then(|both| both.realtime));
        Ok(VmState { interrupts, pit, clock, realtime })
    }

    /// Puts the state into a fresh VM that has the same chips, whose vCPUs have theirs already. The clock goes on.
    ///
    /// # Errors
    /// If KVM refuses a call.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        self.put_chips(vm)?;
        self.clock.map_or(Ok(()), |clock| clock::set(vm, clock))
    }

    fn put_chips(&self, vm: &VmFd) -> Result<(), StateError> {
        if let Some(chips) = &self.interrupts {
            set_chip(vm, KVM_IRQCHIP_PIC_MASTER, &chips.pic_master)?;
            set_chip(vm, KVM_IRQCHIP_PIC_SLAVE, &chips.pic_slave)?;
            set_chip(vm, KVM_IRQCHIP_IOAPIC, &chips.ioapic)?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).call("KVM_SET_PIT2", None)?;
        }
        Ok(())
    }
}

impl MachineState {
    /// Takes the state of a machine whose vCPUs are stopped.
    ///
    /// # Errors
    /// If KVM refuses a call.
    pub fn save(vm: &VmFd, vcpus: &[&VcpuFd], host: &Host, irqchip: bool, pit: bool) -> Result<Self, StateError> {
        let vcpus = vcpus.iter().zip(0..).map(|(vcpu, id)| VcpuState::save(vcpu, id, host, irqchip));
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        // After the vCPUs, so that no interrupt is lost between a local APIC and the chips.
        Ok(MachineState { vm: VmState::save(vm, irqchip, pit)?, vcpus })
    }

    /// Puts the state into a machine of as many vCPUs and the same chips: a fresh one, or a stopped one that is reset to
    /// where it was saved. Time goes on where it was.
    ///
    /// # Errors
    /// If the machine is another one, or KVM refuses something: the machine is then useless.
    pub fn restore(&self, vm: &VmFd, vcpus: &[&VcpuFd], host: &Host) -> Result<Restored, StateError> {
        self.put(vm, vcpus, host, ClockPolicy::GoOn, None)
    }

    /// The same, and says what time it is then.
    ///
    /// # Errors
    /// As [`restore`](MachineState::restore); and if time has to catch up and the snapshot does not say when it was taken.
    pub fn restore_with_clock(
        &self,
        vm: &VmFd,
        vcpus: &[&VcpuFd],
        host: &Host,
        clock: ClockPolicy,
    ) -> Result<Restored, StateError> {
        self.put(vm, vcpus, host, clock, None)
    }

    /// The same, for a machine that was just created and never touched: what it has anyway is left out, which is faster.
    ///
    /// # Errors
    /// As [`restore_with_clock`](MachineState::restore_with_clock).
    pub fn restore_created(
        &self,
        vm: &VmFd,
        vcpus: &[&VcpuFd],
        host: &Host,
        clock: ClockPolicy,
    ) -> Result<Restored, StateError> {
        self.put(vm, vcpus, host, clock, Some(Created::of(vm, host)))
    }

    fn put(
        &self,
        vm: &VmFd,
        vcpus: &[&VcpuFd],
        host: &Host,
        clock: ClockPolicy,
        created: Option<Created>,
    ) -> Result<Restored, StateError> {
        if vcpus.len() != self.vcpus.len() {
            let (here, there) = (vcpus.len(), self.vcpus.len());
            return Err(StateError::Mismatch(format!("it has {here} vCPUs, and {there} were saved")));
        }
        let passing = Passing::begin(&self.vm, vm, clock)?;
        let mut counters = Counters::new(host.has.tsc);
        for (state, vcpu) in self.vcpus.iter().zip(vcpus) {
            state.put(vcpu, host, created, |state| counters.put(vcpu, state, passing.ahead(vm, state.tsc_khz)?))?;
        }
        self.vm.put_chips(vm)?;
        passing.end(&self.vm, vm)?;
        Ok(Restored { tsc: host.has.tsc, caught_up: passing.passed(vm)? })
    }
}
