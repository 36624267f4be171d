//! A VM, made in the order that is fast and right.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use crate::sys::VmWithRam;
use crate::{GuestRam, MachineState, MemoryError};

/// What a machine consists of besides memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineConfig {
    /// How many vCPUs.
    pub vcpus: u32,
    /// Whether the interrupt controllers (local APICs, I/O APIC, two 8259) are in the kernel.
    pub irqchip: bool,
    /// Whether the timer (8254) is in the kernel; takes `irqchip`.
    pub pit: bool,
}

impl MachineConfig {
    /// `vcpus` vCPUs and no interrupt controllers.
    #[must_use]
    pub fn bare(vcpus: u32) -> MachineConfig {
        MachineConfig { vcpus, irqchip: false, pit: false }
    }

    /// `vcpus` vCPUs, interrupt controllers and timer.
    #[must_use]
    pub fn full(vcpus: u32) -> MachineConfig {
        MachineConfig { vcpus, irqchip: true, pit: true }
    }

    /// The machine that such state needs.
    #[must_use]
    pub fn of(state: &MachineState) -> MachineConfig {
        let vcpus = u32::try_from(state.vcpus.len()).unwrap_or(u32::MAX);
        MachineConfig { vcpus, irqchip: state.vm.interrupts.is_some(), pit: state.vm.pit.is_some() }
    }
}

/// A VM with its memory and its vCPUs, of which none has a thread yet.
#[derive(Debug)]
pub struct NewVm {
    // Dropped in this order.
    pub(super) vcpus: Vec<VcpuFd>,
    pub(super) vm: VmWithRam,
    pub(super) config: MachineConfig,
}

/// Why a machine can't be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// KVM refused.
    #[error("{call} failed: {error}")]
    Kvm {
        /// Which call.
        call: &'static str,
        /// What KVM said.
        #[source]
        error: io::Error,
    },
    /// Memory could not be given to it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> MachineError {
    move |error| MachineError::Kvm { call, error: error.into() }
}

impl NewVm {
    /// Makes a VM: memory slots first, then the chips (the first slot would take milliseconds after them), then the
    /// vCPUs.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn new(kvm: &Kvm, ram: Arc<GuestRam>, config: MachineConfig) -> Result<NewVm, MachineError> {
        NewVm::furnish(VmWithRam::new(NewVm::empty(kvm)?, ram)?, config)
    }

    /// A VM with nothing in it.
    pub(super) fn empty(kvm: &Kvm) -> Result<VmFd, MachineError> {
        kvm.create_vm().map_err(failed("KVM_CREATE_VM"))
    }

    /// Puts chips and vCPUs into a VM that has its memory.
    pub(super) fn furnish(both: VmWithRam, config: MachineConfig) -> Result<NewVm, MachineError> {
        let vm = both.vm();
        if config.irqchip {
            vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        }
        if config.pit {
            let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
            vm.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        }
        let create = |id: u32| vm.create_vcpu(id.into()).map_err(failed("KVM_CREATE_VCPU"));
        let vcpus = (0..config.vcpus).map(create).collect::<Result<_, _>>()?;
        Ok(NewVm { vcpus, vm: both, config })
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &VmFd {
        self.vm.vm()
    }

    /// The vCPUs, in the order of their numbers.
    #[must_use]
    pub fn vcpus(&self) -> &[VcpuFd] {
        &self.vcpus
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// What it consists of.
    #[must_use]
    pub fn config(&self) -> MachineConfig {
        self.config
    }
}
