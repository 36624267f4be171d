//! State as device sections: named fields with a description, as QEMU writes its devices, so that any tool that reads
//! such files can show ours.

use vmstate::Section;

use super::record::Record;
use super::{MachineState, StateError, VcpuState, VmState};

/// The section of a vCPU; its instance is the vCPU's number.
pub(super) const VCPU: &str = "kvm-vcpu";
/// The section of what belongs to no vCPU.
pub(super) const VM: &str = "kvm-vm";
/// The version of both.
pub(super) const VERSION: u32 = 1;

/// Words as the processor has them in memory.
fn little_endian(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn vcpu(state: &VcpuState) -> Result<Section, StateError> {
    let cpuid: Vec<u32> = state
        .cpuid
        .iter()
        .flat_map(|leaf| [leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .collect();
    let used = usize::try_from(state.xcrs.nr_xcrs).unwrap_or(usize::MAX).min(state.xcrs.xcrs.len());
    let xcrs: Vec<u64> = state.xcrs.xcrs[..used].iter().flat_map(|xcr| [xcr.xcr.into(), xcr.value]).collect();
    let msrs: Vec<u64> = state.msrs.iter().flat_map(|&(index, value)| [index.into(), value]).collect();
    let mut section = Section::builder(VCPU, state.id, VERSION)
        .u32s("cpuid", &cpuid)
        .structure("regs", "kvm-regs", 1, |to| state.regs.write(to))
        .structure("sregs", "kvm-sregs", 1, |to| state.sregs.write(to))
        .u64s("xcrs", &xcrs)
        .buffer("xsave", &little_endian(&state.xsave))
        .structure("debug", "kvm-debugregs", 1, |to| state.debug.write(to))
        .structure("events", "kvm-vcpu-events", 1, |to| state.events.write(to))
        .structure("mp_state", "kvm-mp-state", 1, |to| state.mp_state.write(to))
        .u64s("msrs", &msrs);
    if let Some(sregs) = &state.sregs2 {
        let (flags, pdptrs) = (sregs.flags, sregs.pdptrs);
        section = section.subsection("kvm-vcpu/sregs2", 1, |to| to.u64("flags", flags).u64s("pdptrs", &pdptrs));
    }
    if let Some(khz) = state.tsc_khz {
        section = section.subsection("kvm-vcpu/tsc_khz", 1, |to| to.u32("tsc_khz", khz));
    }
    if let Some(offset) = state.tsc_offset {
        section = section.subsection("kvm-vcpu/tsc_offset", 1, |to| to.u64("tsc_offset", offset));
    }
    if let Some(ssp) = state.ssp {
        section = section.subsection("kvm-vcpu/ssp", 1, |to| to.u64("ssp", ssp));
    }
    if let Some(lapic) = &state.lapic {
        let bytes = lapic.regs.map(i8::cast_unsigned);
        section = section.subsection("kvm-vcpu/lapic", 1, |to| to.buffer("regs", &bytes));
    }
    Ok(section.build()?)
}

fn vm(state: &VmState) -> Result<Section, StateError> {
    let mut section = Section::builder(VM, 0, VERSION).bool("irqchip", state.interrupts.is_some());
    if let Some(chips) = &state.interrupts {
        section = section.subsection("kvm-vm/irqchip", 1, |to| {
            to.buffer("pic_master", &chips.pic_master)
                .buffer("pic_slave", &chips.pic_slave)
                .buffer("ioapic", &chips.ioapic)
        });
    }
    if let Some(pit) = &state.pit {
        section = section.subsection("kvm-vm/pit", 1, |to| pit.write(to));
    }
    if let Some(clock) = state.clock {
        section = section.subsection("kvm-vm/clock", 1, |to| to.u64("clock", clock));
    }
    if let Some(realtime) = state.realtime {
        section = section.subsection("kvm-vm/realtime", 1, |to| to.u64("realtime", realtime));
    }
    Ok(section.build()?)
}

impl MachineState {
    /// The state as sections, to be written by a [`DeviceWriter`](vmstate::DeviceWriter).
    ///
    /// # Errors
    /// If it can't be encoded.
    pub fn sections(&self) -> Result<Vec<Section>, StateError> {
        let mut sections = vec![vm(&self.vm)?];
        for state in &self.vcpus {
            sections.push(vcpu(state)?);
        }
        Ok(sections)
    }
}
